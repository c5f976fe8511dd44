"""Random packed documents with images, as visible intervals and as an explicit mask."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch


@dataclass(frozen=True)
class Visibility:
    """Who sees whom in a batch: text sees backwards, images see all of themselves too.

    An image without its condition sees nothing but itself, while what follows it sees everything.
    """

    document_ids: np.ndarray
    """[b, s]: document of every position, ascending along a sequence."""
    images: np.ndarray
    """[b, s]: number of the image of every position, -1 in text."""
    alone: np.ndarray
    """[b, s] bool: position of an image without its condition."""

    @classmethod
    def random(cls, document_ids: np.ndarray, seed: int) -> Visibility:
        """Place images of random lengths in documents, about half of them without a condition."""
        generator = np.random.default_rng(seed)
        images = np.full(document_ids.shape, -1)
        alone = np.zeros(document_ids.shape, dtype=bool)
        for row, numbers in enumerate(document_ids):
            starts = np.append(
                np.flatnonzero(np.diff(numbers, prepend=numbers[0] - 1)), len(numbers)
            )
            for begin, end in pairwise(starts):
                place = begin
                while place < end:
                    run = slice(place, min(end, place + int(generator.integers(1, 9))))
                    if generator.random() < 0.4:
                        images[row, run] = place
                        alone[row, run] = generator.random() < 0.5
                    place = run.stop
        return cls(document_ids, images, alone)

    @property
    def intervals(self) -> tuple[np.ndarray, np.ndarray]:
        """First visible position of every position and the one after the last, [b, s] each."""
        found = self.mask
        return found.argmax(-1), found.shape[-1] - found[..., ::-1].argmax(-1)

    @property
    def mask(self) -> np.ndarray:
        """[b, s, s] bool: whether a query (second dimension) sees a key."""
        query, key = np.arange(self.images.shape[1])[:, None], np.arange(self.images.shape[1])
        image = self.images[:, :, None]
        same_image = (image == self.images[:, None, :]) & (image >= 0)
        same_document = self.document_ids[:, :, None] == self.document_ids[:, None, :]
        seen = same_document & ((key <= query) | same_image)
        return np.where(self.alone[:, :, None], same_document & same_image, seen)

    @property
    def batch_mask(self) -> torch.Tensor:
        """[t, t] bool: the same for all positions of the batch, which see only their sequence."""
        return torch.block_diag(*torch.from_numpy(self.mask)).bool()
