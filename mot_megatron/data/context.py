"""Tokens of a split that are context only: nothing is trained to predict them.

Their runs are stored beside the token files, in NAME.context: pairs of little-endian 64-bit
integers, the first token of each run and its end, counted through all documents.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from mot_megatron.data.intervals import NONE
from mot_megatron.errors import DataError
from mot_megatron.files import regular_file_size

DTYPE = np.dtype("<i8")


class ContextCounts(BaseModel):
    """The tokens of a split that are context only: nothing is trained to predict them."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    intervals: int = Field(ge=1)
    """Number of runs of such tokens, in the file NAME.context."""
    tokens_per_modality: dict[str, int]
    sha256: str
    """SHA-256 of the file, in hexadecimal."""


def context_path(prefix: Path) -> Path:
    """Return the path of the runs of the split whose token files have this prefix."""
    return prefix.with_name(prefix.name + ".context")


def open_context(prefix: Path, counts: ContextCounts | None) -> np.ndarray:
    """Map the runs of a split, [n, 2] int64; none without ``counts``.

    Raises:
        DataError: The file has another size than ``counts`` says.
        OSError: It cannot be opened.
    """
    if counts is None:
        return NONE
    path = context_path(prefix)
    expected = counts.intervals * NONE.shape[1] * DTYPE.itemsize
    found = regular_file_size(path)
    if found != expected:
        raise DataError(
            f"{path}: {found} bytes, expected {expected} for its {counts.intervals} intervals;"
            " truncated or replaced?"
        )
    return np.asarray(np.memmap(path, dtype=DTYPE, mode="r")).reshape(-1, 2)


def check_context(prefix: Path, context: np.ndarray, tokens: int) -> None:
    """Check that the runs of a split of ``tokens`` tokens are sorted, within it and not empty.

    Raises:
        DataError: Names the file and the first run that is not.
    """
    ends = np.concatenate(([0], context[:, 1]))
    wrong = (context[:, 0] < ends[:-1]) | (context[:, 0] >= context[:, 1])
    wrong |= context[:, 1] > tokens
    if wrong.any():
        place = int(np.flatnonzero(wrong)[0])
        first, end = context[place].tolist()
        raise DataError(
            f"{context_path(prefix)}: interval {place} is {first}..{end}, expected sorted ones"
            f" within the {tokens} tokens, none of them empty"
        )
