"""The vectors of a continuous modality: two files per split.

``SPLIT.MODALITY.rows`` holds one vector per position of the modality, in the order of documents and
positions, [rows, width] float16; ``SPLIT.MODALITY.offsets`` the first row of every document and the
end of the last one, [documents + 1] int64. Both are little-endian. In the token file, the positions
hold the placeholder, the only id of the modality.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from mot_megatron.errors import DataError

ROW_TYPE, OFFSET_TYPE = np.dtype("<f2"), np.dtype("<i8")


class LatentDigests(BaseModel):
    """SHA-256 of the two files of a continuous modality in a split, in hexadecimal."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    rows: str
    offsets: str


def rows_path(prefix: Path, modality: str) -> Path:
    """Return the path of the vectors, given the split's path without suffix."""
    return prefix.with_name(f"{prefix.name}.{modality}.rows")


def offsets_path(prefix: Path, modality: str) -> Path:
    """Return the path of the offsets, given the split's path without suffix."""
    return prefix.with_name(f"{prefix.name}.{modality}.offsets")


@dataclass(frozen=True)
class LatentRows:
    """The vectors of one continuous modality in a split; indexing returns those of a document."""

    rows: np.ndarray
    """[rows, width] float16, all documents concatenated, memory-mapped read-only."""
    offsets: np.ndarray
    """[documents + 1] int64: first row of each document, and end of the last one."""

    def __getitem__(self, document: int) -> np.ndarray:
        if not 0 <= document < len(self.offsets) - 1:
            raise IndexError(f"document {document} of {len(self.offsets) - 1}")
        return self.rows[self.offsets[document] : self.offsets[document + 1]]

    def check_documents(self, placeholders: np.ndarray, source: Path) -> None:
        """Check that every document has as many vectors as placeholders.

        Args:
            placeholders: [documents] int64, placeholders in each document.
            source: The file of the offsets, for error messages.

        Raises:
            DataError: A document has not.
        """
        rows = np.diff(self.offsets)
        wrong = np.flatnonzero(rows != placeholders)
        if wrong.size:
            raise DataError(
                f"{source}: document {wrong[0]} has {rows[wrong[0]]} vectors, but its tokens have"
                f" {placeholders[wrong[0]]} placeholders"
            )


def open_latents(
    prefix: Path, modality: str, *, width: int, documents: int, rows: int
) -> LatentRows:
    """Map the vectors of a modality and read their offsets, without reading the vectors.

    Args:
        prefix: Path of the split without suffix.
        modality: Name of the modality.
        width: Numbers of a vector.
        documents: Documents of the split.
        rows: Positions of the modality in the split.

    Raises:
        DataError: A file is missing or its size or its offsets are wrong.
    """
    path, offsets_file = rows_path(prefix, modality), offsets_path(prefix, modality)
    _check_size(path, rows * width * ROW_TYPE.itemsize, f"{rows} vectors of {width}")
    _check_size(offsets_file, (documents + 1) * OFFSET_TYPE.itemsize, f"{documents} documents")
    offsets = np.fromfile(offsets_file, dtype=OFFSET_TYPE)
    if offsets[0] != 0 or offsets[-1] != rows or (np.diff(offsets) < 0).any():
        raise DataError(f"{offsets_file}: its offsets do not ascend from 0 to {rows}")
    if not rows:  # an empty file cannot be mapped
        return LatentRows(np.empty((0, width), ROW_TYPE), offsets)
    mapped = np.memmap(path, dtype=ROW_TYPE, mode="r", shape=(rows, width))
    return LatentRows(np.asarray(mapped), offsets)


def _check_size(path: Path, expected: int, content: str) -> None:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    found = path.stat().st_size
    if found != expected:
        raise DataError(
            f"{path}: {found} bytes, expected {expected} ({content}); truncated or replaced?"
        )


class LatentFileWriter:
    """Writes the files of one continuous modality, document by document."""

    def __init__(self, prefix: Path, modality: str) -> None:
        self._offsets_file = offsets_path(prefix, modality)
        self._stream = rows_path(prefix, modality).open("wb")
        self._offsets = [0]

    def add(self, parts: Sequence[np.ndarray]) -> None:
        """Append the vectors of the next document, [n, width] each; it may have none.

        Raises:
            OSError: The file cannot be written.
        """
        for part in parts:
            self._stream.write(np.ascontiguousarray(part, ROW_TYPE).data)
        self._offsets.append(self._offsets[-1] + sum(map(len, parts)))

    def finish(self) -> None:
        """Close the rows and write the offsets.

        Raises:
            OSError: A file cannot be written.
        """
        self._stream.close()
        self._offsets_file.write_bytes(np.array(self._offsets, OFFSET_TYPE).tobytes())

    def close(self) -> None:
        """Close the rows, which are valid only after ``finish``."""
        try:
            self._stream.close()
        except OSError:
            # Closing retries the flush that failed on a full disk, and closes nevertheless.
            assert self._stream.closed


def checked_vectors(values: object, width: int, where: str) -> np.ndarray:
    """Return the vectors of a segment as [n, width] float16.

    Raises:
        DataError: The shape or dtype is another, or a number is not finite in float16.
    """
    array = np.asarray(values)
    if array.ndim != 2 or array.shape[1] != width or not np.issubdtype(array.dtype, np.number):
        raise DataError(
            f"{where}: vectors of dtype {array.dtype} and shape {array.shape}, expected numbers of"
            f" shape [n, {width}]"
        )
    with np.errstate(over="ignore"):
        rounded = array.astype(ROW_TYPE)
    wrong = np.argwhere(~np.isfinite(rounded))
    if len(wrong):
        raise DataError(
            f"{where}: vector {wrong[0][0]} has {array[tuple(wrong[0])]} at {wrong[0][1]}, expected"
            f" a number from -{np.finfo(ROW_TYPE).max:g} to {np.finfo(ROW_TYPE).max:g}"
        )
    return rounded
