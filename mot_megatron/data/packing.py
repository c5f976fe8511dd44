"""Packing: which documents share a sequence of seq_length positions.

Documents stay whole. The C++ core fills more than 99% of the positions and keeps the bins mixed; an
epoch is a pure function of (lengths, seq_length, seed, epoch), which is what makes training data
resumable without saving more than a position.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mot_megatron.data import _native
from mot_megatron.errors import DataError

ALGORITHM_VERSION = 1
"""Of the sequence and budget packing: a change of either's result raises it, because a saved
position means nothing in another stream."""


@dataclass(frozen=True)
class Packing:
    """Documents in the order of the bins (sequences) that hold them."""

    order: np.ndarray
    """[documents] int64: document numbers, bin after bin."""
    bin_offsets: np.ndarray
    """[bins + 1] int64: where each bin begins in ``order``, and where the last ends."""

    def __len__(self) -> int:
        return len(self.bin_offsets) - 1

    def __getitem__(self, number: int) -> np.ndarray:
        """The document numbers of one bin."""
        return self.order[self.bin_offsets[number] : self.bin_offsets[number + 1]]


def check_lengths(lengths: np.ndarray, capacity: int, source: str) -> None:
    """Check that every document fits.

    Args:
        lengths: [documents] int64, tokens of each document.
        capacity: Positions of a sequence, seq_length.
        source: What the error message names, for example the split's path.

    Raises:
        DataError: There are no documents, or one is empty or longer than ``capacity``.
    """
    if lengths.size == 0:
        raise DataError(f"{source}: no documents, expected at least one")
    wrong = np.flatnonzero((lengths < 1) | (lengths > capacity))
    if wrong.size:
        raise DataError(
            f"{source}: document {wrong[0]} has {lengths[wrong[0]]} tokens, expected "
            f"1..{capacity} (seq_length)"
        )


def pack(lengths: np.ndarray, capacity: int, source: str = "documents") -> Packing:
    """Distribute documents over as few bins as possible, keeping their order where it can.

    Args:
        lengths: [documents] int64, tokens of each document.
        capacity: Tokens that a bin holds, seq_length.
        source: As in ``check_lengths``.

    Raises:
        DataError: As ``check_lengths``.
    """
    check_lengths(lengths, capacity, source)
    order, bin_offsets = _native.pack(lengths, capacity)
    return Packing(order, bin_offsets)


def pack_epoch(
    lengths: np.ndarray, capacity: int, *, seed: int, epoch: int, source: str = "documents"
) -> Packing:
    """Pack all documents in an order drawn from (seed, epoch), and draw the order of the bins.

    Args:
        lengths: [documents] int64, tokens of each document.
        capacity: Tokens that a bin holds, seq_length.
        seed: Not negative.
        epoch: Not negative; epochs of one seed are independent draws.
        source: As in ``check_lengths``.

    Raises:
        DataError: As ``check_lengths``.
    """
    check_lengths(lengths, capacity, source)
    generator = np.random.default_rng([seed, epoch])
    documents = generator.permutation(len(lengths))
    return shuffled(pack(lengths[documents], capacity), documents, generator)


def shuffled(
    packing: Packing,
    documents: np.ndarray,
    generator: np.random.Generator,
    *,
    sequences_per_bin: int = 1,
) -> Packing:
    """Draw the order of the bins: the core packs the hardest leftovers last.

    Args:
        packing: Of documents in some order; as many sequences as fill whole bins.
        documents: [documents] int64, that order: the numbers the result names documents by.
        generator: What the order is drawn from.
        sequences_per_bin: Sequences that stay together, in their order.
    """
    bins = generator.permutation(len(packing) // sequences_per_bin)
    sequences = (bins[:, None] * sequences_per_bin + np.arange(sequences_per_bin)).reshape(-1)
    sizes = np.diff(packing.bin_offsets)[sequences]
    bin_offsets = np.zeros(len(sequences) + 1, dtype=np.int64)
    np.cumsum(sizes, out=bin_offsets[1:])
    moved_by = np.repeat(packing.bin_offsets[sequences] - bin_offsets[:-1], sizes)
    order = packing.order[np.arange(len(documents)) + moved_by]
    return Packing(documents[order], bin_offsets)
