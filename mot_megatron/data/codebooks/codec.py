"""What every codec offers: ids of the vocabulary in, something to read, see or hear out.

Ids are those that stand in the corpus (of the whole vocabulary); a codec knows where its
modality's range begins.
"""

from __future__ import annotations

import io
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mot_megatron.data.corpus import Modality
from mot_megatron.errors import DataError

TokenIds = Sequence[int] | np.ndarray


class Codec(ABC):
    """Turns ids of one modality back; a subclass serves one value of a modality's ``codec``."""

    suffix: ClassVar[str]
    """File name suffix of what ``write`` writes."""
    row_length: ClassVar[int] = 2
    """Distance, in tokens, to the neighbor that best predicts a token after the one before it.

    2 where tokens are a line; the tokens of a row where they are a raster, whose token above then
    tells more than the one two to the left.
    """
    tokens_per_item: ClassVar[int | None] = None
    """Ids that one item always has, or None where the length varies."""

    def __init__(self, modality: Modality) -> None:
        self.modality = modality

    @classmethod
    @abstractmethod
    def load(cls, path: Path, modality: Modality) -> Codec:
        """Read the codebook file.

        Raises:
            DataError: The file is missing, is no codebook of this kind, or its size is not the
                modality's.
        """

    @abstractmethod
    def decode(self, token_ids: TokenIds) -> Any:
        """One item back from its ids.

        Raises:
            DataError: An id lies outside the modality's range, or the number of ids is not legal.
        """

    @abstractmethod
    def write(self, token_ids: TokenIds, path: Path) -> None:
        """Decode one item into a file with the codec's suffix.

        Raises:
            DataError: As ``decode``.
        """

    def codes(self, token_ids: TokenIds) -> np.ndarray:
        """Positions inside the modality's range, [n] int64.

        Raises:
            DataError: An id lies outside the range.
        """
        ids = np.asarray(token_ids, dtype=np.int64)
        first, end = self.modality.first_id, self.modality.end_id
        wrong = np.flatnonzero((ids < first) | (ids >= end))
        if wrong.size:
            raise DataError(
                f"token id {ids[wrong[0]]} at position {wrong[0]} is not of modality "
                f"{self.modality.name}, expected {first}..{end - 1}"
            )
        return ids - first


def pack_arrays(**arrays: np.ndarray) -> bytes:
    """An .npz file's bytes; the same arrays always give the same bytes."""
    stream = io.BytesIO()
    np.savez(stream, allow_pickle=False, **arrays)
    return stream.getvalue()


def read_arrays(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, whose names and shapes must be ``shapes``.

    Raises:
        DataError: The file is missing, damaged, or holds other arrays.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    except (ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: not a codebook: {error}") from None
    found = {name: array.shape for name, array in arrays.items()}
    if found != shapes:
        raise DataError(f"{path}: holds arrays of shapes {found}, expected {shapes}")
    return arrays
