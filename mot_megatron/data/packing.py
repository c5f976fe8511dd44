"""Packing: assign documents to sequences of seq_length positions.

Documents are never split. The C++ core fills more than 99% of the positions and keeps the bins
mixed. An epoch is a pure function of (lengths, seq_length, seed, epoch), so a position is all that
must be saved to resume.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mot_megatron.data import _native
from mot_megatron.errors import DataError

ALGORITHM_VERSION = 1
"""Version of the sequence and budget packing. A change of either's result must raise it, because a
saved position is meaningless in another stream."""


@dataclass(frozen=True)
class Packing:
    """An assignment of documents to bins, which are sequences."""

    order: np.ndarray
    """[documents] int64: document numbers, one bin after the other."""
    bin_offsets: np.ndarray
    """[bins + 1] int64: start of each bin in ``order``, and end of the last one."""

    def __len__(self) -> int:
        return len(self.bin_offsets) - 1

    def __getitem__(self, number: int) -> np.ndarray:
        """Return the document numbers of one bin."""
        return self.order[self.bin_offsets[number] : self.bin_offsets[number + 1]]


def check_lengths(lengths: np.ndarray, capacity: int, source: str) -> None:
    """Check that every document fits.

    Args:
        lengths: [documents] int64, tokens of each document.
        capacity: Positions of a sequence, seq_length.
        source: Name for error messages, for example the path of the split.

    Raises:
        DataError: There are no documents, or one is empty or longer than ``capacity``.
    """
    if lengths.size == 0:
        raise DataError(f"{source}: no documents, expected at least one")
    wrong = np.flatnonzero((lengths < 1) | (lengths > capacity))
    if wrong.size:
        remedy = '; data.long_documents can be "split" or "truncate"'
        raise DataError(
            f"{source}: document {wrong[0]} has {lengths[wrong[0]]} tokens, expected "
            f"1..{capacity} (seq_length){remedy if lengths[wrong[0]] else ''}"
        )


def pack(lengths: np.ndarray, capacity: int, source: str = "documents") -> Packing:
    """Distribute documents over as few bins as possible, mostly in their order.

    Args:
        lengths: [documents] int64, tokens of each document.
        capacity: Tokens per bin, seq_length.
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
    """Pack all documents in a random order, and put the bins into a random order.

    Both orders depend only on (seed, epoch).

    Args:
        lengths: [documents] int64, tokens of each document.
        capacity: Tokens per bin, seq_length.
        seed: 0 or more.
        epoch: 0 or more; the orders of different epochs are independent.
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
    """Put the bins into a random order, since the core packs the hardest leftovers last.

    Args:
        packing: Packing of documents in some order, with a whole number of bins.
        documents: [documents] int64, that order, as document numbers of the result.
        generator: Random generator.
        sequences_per_bin: Number of sequences that stay together, in their order.
    """
    bins = generator.permutation(len(packing) // sequences_per_bin)
    sequences = (bins[:, None] * sequences_per_bin + np.arange(sequences_per_bin)).reshape(-1)
    sizes = np.diff(packing.bin_offsets)[sequences]
    bin_offsets = np.zeros(len(sequences) + 1, dtype=np.int64)
    np.cumsum(sizes, out=bin_offsets[1:])
    moved_by = np.repeat(packing.bin_offsets[sequences] - bin_offsets[:-1], sizes)
    order = packing.order[np.arange(len(documents)) + moved_by]
    return Packing(documents[order], bin_offsets)
