"""Codebook files of arrays (.npz), read without trusting what they claim."""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from pathlib import Path

import numpy as np

from mot_megatron.errors import DataError
from mot_megatron.files import regular_file_size

_LARGEST_ITEM = 8
"""Largest size of one number, in bytes."""
_HEADER_BYTES = 4096
"""Upper bound on the header of one array in an .npz file, in bytes."""
_DAMAGE = (
    ValueError, EOFError, AttributeError, NotImplementedError, MemoryError, zipfile.BadZipFile,
    zlib.error,
)  # fmt: skip
"""What numpy and zipfile raise for damaged files."""


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
    except _DAMAGE as error:
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


def array_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes that an .npz file says its arrays have; no values are read.

    Raises:
        DataError: The file is missing or damaged.
    """
    shapes = {}
    try:
        regular_file_size(path)
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                with archive.open(member) as stream:
                    if np.lib.format.read_magic(stream) != (1, 0):
                        raise ValueError(f"{member} has an unknown version")
                    header = np.lib.format.read_array_header_1_0(stream, _HEADER_BYTES)
                shapes[member.removesuffix(".npy")] = header[0]
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    except _DAMAGE as error:
        raise DataError(f"{path}: not an .npz file of arrays: {error}") from None
    return shapes
