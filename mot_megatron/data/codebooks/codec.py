"""The interface of codecs, which decode ids into text, pictures or sound.

Ids are those of the whole vocabulary, as in the corpus; a codec knows the range of its modality.
"""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mot_megatron.data.corpus import Modality
from mot_megatron.errors import DataError
from mot_megatron.files import regular_file_size

_LARGEST_ITEM = 8
"""Largest size of one number, in bytes."""
_HEADER_BYTES = 4096
"""Upper bound on the header of one array in an .npz file, in bytes."""

TokenIds = Sequence[int] | np.ndarray


class Codec(ABC):
    """Decodes the ids of one modality; there is one subclass per value of ``Modality.codec``."""

    suffix: ClassVar[str]
    """File name suffix for ``write``."""
    row_length: ClassVar[int] = 2
    """Distance, in tokens, to the second neighbor that helps most to predict a token.

    It is 2 for a sequence. For a raster it is the number of tokens in a row, since the token above
    helps more than the one two to the left.
    """
    tokens_per_item: ClassVar[int | None] = None
    """Number of ids of an item; None if it varies."""

    def __init__(self, modality: Modality) -> None:
        self.modality = modality

    @classmethod
    @abstractmethod
    def load(cls, path: Path, modality: Modality) -> Codec:
        """Read the codebook file.

        Raises:
            DataError: The file is missing, is not a codebook of this kind, or has another size than
                the modality.
        """

    @abstractmethod
    def decode(self, token_ids: TokenIds) -> Any:
        """Decode one item.

        Raises:
            DataError: An id is outside the modality's range, or the number of ids is invalid.
        """

    @abstractmethod
    def write(self, token_ids: TokenIds, path: Path) -> None:
        """Decode one item to a file with the codec's suffix.

        Raises:
            DataError: As ``decode``.
        """

    def codes(self, token_ids: TokenIds) -> np.ndarray:
        """Return the positions of ids within the modality's range, [n] int64.

        Raises:
            DataError: An id is outside the range.
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
    """Return the bytes of an .npz file; equal arrays give equal bytes."""
    stream = io.BytesIO()
    np.savez(stream, allow_pickle=False, **arrays)
    return stream.getvalue()


def read_arrays(
    path: Path, shapes: dict[str, tuple[int, ...]], *, at_most: bool = False
) -> dict[str, np.ndarray]:
    """Read an .npz file of finite numbers, whose names and shapes must be ``shapes``.

    The total uncompressed size is checked before any array is read. With ``at_most``, arrays may
    have fewer rows than ``shapes`` says.

    Raises:
        DataError: The file is missing, damaged or too large, or contains other arrays or values
            that are not finite.
    """
    limit = sum(_LARGEST_ITEM * math.prod(shape) + _HEADER_BYTES for shape in shapes.values())
    try:
        regular_file_size(path)
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > limit:
            raise DataError(f"{path}: {size} bytes of arrays, expected at most {limit}")
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    except (
        ValueError, EOFError, AttributeError, NotImplementedError, MemoryError, zipfile.BadZipFile,
        zlib.error,
    ) as error:  # fmt: skip
        raise DataError(f"{path}: not an .npz file of arrays: {error}") from None
    found = {name: array.shape for name, array in arrays.items()}
    cut = {
        name: (min(len(arrays[name]), shape[0]), *shape[1:])
        if at_most and name in arrays and arrays[name].ndim
        else shape
        for name, shape in shapes.items()
    }
    if found != cut:
        raise DataError(f"{path}: contains arrays of shapes {found}, expected {shapes}")
    for name, array in arrays.items():
        if array.dtype.kind not in "fiu" or not np.isfinite(array).all():
            raise DataError(f"{path}: {name} contains values that are not finite numbers")
    return arrays
