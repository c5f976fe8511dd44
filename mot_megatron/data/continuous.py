"""What images as vectors add to a micro-batch: noise, visible intervals, and no labels.

An image is a run of positions of one continuous modality within a document. Letters: b sequences of
s positions, n positions of an image, w its width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from mot_megatron.config_model import ObjectiveConfig
from mot_megatron.data.corpus import CorpusDescription, TokenSplit
from mot_megatron.data.noise import DIFFUSION_STEPS, Noised, draw_time, noised
from mot_megatron.model.micro_batch import NO_LABEL, LatentRows, MicroBatch

_GOLDEN = 0.6180339887498949
"""Multiples of it, modulo 1, are spread evenly, however many there are."""


@dataclass(frozen=True)
class Place:
    """The place of a sequence in the stream, which seeds its noise."""

    seed: int
    epoch: int
    sequence: int
    """Number within the epoch."""
    training: bool
    """Whether times are drawn and conditions dropped; otherwise times are spread evenly."""


@dataclass(frozen=True)
class Image:
    """An image with noise in a micro-batch."""

    modality: int
    row: int
    """Its sequence in the micro-batch."""
    begin: int
    """Its first position in the sequence."""
    content: Noised
    alone: bool
    """Whether it sees nothing but itself."""

    @property
    def end(self) -> int:
        """The position after its last one."""
        return self.begin + len(self.content.inputs)


class ImageReader:
    """Reads the images of documents and adds noise to them."""

    def __init__(
        self,
        split: TokenSplit,
        description: CorpusDescription,
        objectives: Sequence[ObjectiveConfig],
    ) -> None:
        self._latents = split.latents
        self._modality_of_id = description.modality_of_id
        self._special = np.array(sorted(description.special_tokens.values()), dtype=np.int64)
        self._continuous = {
            index: (modality.name, objectives[index])
            for index, modality in enumerate(description.modalities)
            if modality.width is not None
        }

    def read(
        self, place: Place, row: int, documents: Sequence[tuple[int, int, np.ndarray]]
    ) -> Iterator[Image]:
        """Yield the images of a sequence.

        Args:
            place: Of the sequence.
            row: Of the sequence in the micro-batch.
            documents: Number, first position and ids of each document of the sequence.
        """
        segment = 0
        for document, start, ids in documents:
            used = dict.fromkeys(self._continuous, 0)
            for modality, begin, end in self._runs(ids):
                name, objective = self._continuous[modality]
                first = used[modality]
                used[modality] = first + end - begin
                clean = self._latents[name][document][first : used[modality]]
                followed = bool((~np.isin(ids[end:], self._special)).any())
                content, alone = _with_noise(clean, objective, place, segment, followed)
                yield Image(modality, row, start + begin, content, alone)
                segment += 1

    def _runs(self, ids: np.ndarray) -> Iterator[tuple[int, int, int]]:
        """Yield modality, begin and end of each run of positions of a continuous modality."""
        modalities = self._modality_of_id[ids]
        bounds = [0, *(np.flatnonzero(np.diff(modalities)) + 1).tolist(), len(ids)]
        for begin, end in pairwise(bounds):
            if int(modalities[begin]) in self._continuous:
                yield int(modalities[begin]), begin, end


def _with_noise(
    clean: np.ndarray, objective: ObjectiveConfig, place: Place, segment: int, followed: bool
) -> tuple[Noised, bool]:
    """Return an image with its noise, and whether it sees nothing but itself."""
    generator = np.random.default_rng([place.seed, place.epoch, place.sequence, segment])
    alone = bool(generator.random() < objective.condition_dropout) and place.training
    if place.training:
        limit = objective.context_noise_limit if followed else 1.0
        time = draw_time(objective, limit, generator)
    else:
        time = (97 * place.sequence + segment + 0.5) * _GOLDEN % 1
        if objective.kind == "diffusion":
            time = max(1, round(time * DIFFUSION_STEPS)) / DIFFUSION_STEPS
    noise = generator.standard_normal(clean.shape, dtype=np.float32)
    return noised(objective.kind, clean, time, noise), alone


def intervals(document_ids: np.ndarray, images: Sequence[Image]) -> tuple[np.ndarray, np.ndarray]:
    """Return the visible intervals of documents with images, two arrays [b, s].

    Args:
        document_ids: [b, s], equal within a document and ascending along a sequence.
        images: Images of the micro-batch, which see all of themselves.
    """
    places = np.arange(document_ids.shape[1])
    starts = np.ones(document_ids.shape, dtype=bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    first = np.maximum.accumulate(np.where(starts, places, 0), axis=1)
    end = np.tile(places + 1, (len(document_ids), 1))
    for image in images:
        part = image.row, slice(image.begin, image.end)
        end[part] = image.end
        if image.alone:
            first[part] = image.begin
    return first, end


def with_images(
    batch: MicroBatch,
    images: Sequence[Image],
    modality_of_id: np.ndarray,
    widths: Sequence[int | None],
) -> MicroBatch:
    """Add the vectors of images to a micro-batch on the host that holds all towers.

    Positions of images and those before them get no label, because neither a placeholder nor what
    follows an image's last position is predicted as a token there.

    Args:
        batch: The micro-batch of the token ids.
        images: Its images, in the order of sequences and positions.
        modality_of_id: [vocab_size] modality index of each id.
        widths: Width of each modality; None for tokens.
    """
    continuous = torch.tensor([width is not None for width in widths])
    own = continuous[torch.from_numpy(modality_of_id.astype(np.int64))[batch.token_ids]]
    unlabeled = own | continuous[batch.label_modalities]
    labels = batch.labels.masked_fill(unlabeled, NO_LABEL)
    label_modalities = batch.label_modalities.masked_fill(labels == NO_LABEL, 0)
    counts = torch.bincount(label_modalities[labels != NO_LABEL], minlength=len(widths)).tolist()
    rows = []
    for modality, width in enumerate(widths):
        if width is not None:
            its = [image for image in images if image.modality == modality]
            rows.append(_rows(batch, modality, width, its))
            counts[modality] = len(rows[-1].slots)
    return dataclasses.replace(
        batch,
        labels=labels,
        label_modalities=label_modalities,
        modality_labels=tuple(counts),
        latents=tuple(rows),
    )


def _rows(batch: MicroBatch, modality: int, width: int, images: Sequence[Image]) -> LatentRows:
    length = batch.visible_from.shape[1]
    empty = np.empty((0, width), np.float32)
    places = [np.arange(i.begin, i.end) + i.row * length for i in images]
    times = [np.full(len(i.content.inputs), i.content.time, np.float32) for i in images]
    positions = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *places]))
    return LatentRows(
        modality,
        batch.ungroup_index[positions],
        torch.from_numpy(np.concatenate([empty, *(i.content.inputs for i in images)])),
        torch.from_numpy(np.concatenate([empty, *(i.content.targets for i in images)])),
        torch.from_numpy(np.concatenate([np.empty(0, np.float32), *times])),
    )
