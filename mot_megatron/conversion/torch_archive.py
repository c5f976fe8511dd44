"""Read files of ``torch.save`` without running what their pickle asks for.

Such a file is a zip archive of a pickle and the bytes of each storage. The pickle is read here with
nothing but stand-ins for the few names that weights and DeepSpeed's own state need; any other name
is refused. Tensors become records of where their values are, and values are read one at a time.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch

from mot_megatron.checkpoint.storage import UNPICKLING_ERRORS, check_members, check_pickle
from mot_megatron.conversion.tensors import TensorInfo
from mot_megatron.errors import CheckpointError
from mot_megatron.files import regular_file_size

_LONGEST_PICKLE_BYTES = 1 << 26
"""Limit for the part of a file that is not values, enough for a million tensors."""
_MOST_ELEMENTS = 1 << 60
_PICKLE = "data.pkl"
_LOCAL_HEADER = struct.Struct("<4s22xHH")
"""What precedes a member's bytes: a signature, and the lengths of its name and of extra fields."""
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_INERT = {
    ("torch", "Tensor"),
    ("torch.nn.parameter", "Parameter"),
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
}
"""Classes whose values nobody here needs."""


@dataclass(frozen=True)
class StoredTensor:
    """A contiguous tensor in a file, or some consecutive elements of one."""

    path: Path
    offset: int
    """From the start of the file, in bytes."""
    info: TensorInfo

    @property
    def num_elements(self) -> int:
        """Number of elements."""
        return math.prod(self.info.shape)

    def part(self, start: int, length: int) -> StoredTensor:
        """Return consecutive elements as a vector."""
        info = TensorInfo((length,), self.info.dtype)
        return replace(self, offset=self.offset + start * info.dtype.itemsize, info=info)

    def read_into(self, memory: memoryview) -> None:
        """Read the values into memory of their size.

        Raises:
            CheckpointError: The file cannot be read, or has become shorter.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                complete = file.readinto(memory) == len(memory)  # type: ignore[attr-defined]
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}") from None
        if not complete:
            raise CheckpointError(f"{self.path} is shorter than it was")


def read_archive(path: Path) -> Any:
    """Return what was saved: containers, numbers and strings, and a record for each tensor.

    Objects of DeepSpeed's classes are replaced by empty ones.

    Raises:
        CheckpointError: The file is damaged, is no archive, is a link, or refers to anything else.
    """
    try:
        if path.is_symlink():
            raise ValueError("it is a symbolic link")
        size = regular_file_size(path)
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            members = check_members(archive, size)
            roots = [name[: -len(_PICKLE)] for name in members if name.endswith("/" + _PICKLE)]
            if len(roots) != 1:
                raise ValueError(f"it has {len(roots)} members {_PICKLE}, not one")
            root, name = roots[0], roots[0] + _PICKLE
            if members[name].file_size > _LONGEST_PICKLE_BYTES:
                raise ValueError(f"its pickle has {members[name].file_size} bytes")
            order = members.get(root + "byteorder")
            if order is not None and archive.read(order)[:6] != b"little":
                raise ValueError("its numbers are not little-endian")
            content = archive.read(name)
            places = {
                member.removeprefix(root + "data/"): (_start_of(file, info, size), info.file_size)
                for member, info in members.items()
                if member.startswith(root + "data/")
            }
        check_pickle(content)
        return _Unpickler(content, path, places).load()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (*UNPICKLING_ERRORS, struct.error, zipfile.BadZipFile) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path}: not read, for safety or because of damage: {reason}"
        ) from None


def _start_of(file: IO[bytes], member: zipfile.ZipInfo, size: int) -> int:
    """Return where a member's bytes start."""
    file.seek(member.header_offset)
    signature, name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    start = member.header_offset + _LOCAL_HEADER.size + name + extra
    if signature != b"PK\x03\x04" or start + member.file_size > size:
        raise ValueError(f"{member.filename} is not in the file")
    return start


class _Inert:
    """Stands in for an object; what a pickle says of its content is dropped."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


@dataclass(frozen=True)
class _Storage:
    offset: int
    num_elements: int
    dtype: torch.dtype


class _Unpickler(pickle.Unpickler):
    def __init__(self, content: bytes, path: Path, places: Mapping[str, tuple[int, int]]) -> None:
        super().__init__(io.BytesIO(content))
        self.path, self.places = path, places
        self.known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch", "Size"): tuple,
            # Bound methods: a pickle cannot set attributes of these.
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): self._parameter,
            ("torch._tensor", "_rebuild_from_type_v2"): self._typed,
            **{("torch", name): dtype for name, dtype in _STORAGES.items()},
            **{("torch", str(dtype)[6:]): dtype for dtype in _STORAGES.values()},
            **dict.fromkeys(_INERT, _Inert),
            # Python 3.11.0 to 3.11.3 pickle members of enumerations with it.
            ("__builtin__", "getattr"): self._member,
        }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.known[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it refers to {module}.{name}, which weights do not need; where you trust the"
                " file, convert the checkpoint with deepspeed.checkpoint.ds_to_universal"
            ) from None

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _location, count = pid
        if key not in self.places:
            raise ValueError(f"storage {key} is not in it")
        offset, size = self.places[key]
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not _is_natural(count):
            raise TypeError(f"storage {key} is no storage of numbers")
        if count * dtype.itemsize > size:
            raise ValueError(f"storage {key} should have {count} elements, but has {size} bytes")
        return _Storage(offset, count, dtype)

    def _member(self, owner: Any, _name: str) -> _Inert:
        if owner is not _Inert:
            raise pickle.UnpicklingError(f"it calls getattr on {owner!r}")
        return _Inert()

    def _tensor(
        self, storage: _Storage, start: int, shape: Any, strides: Any, *_: Any
    ) -> StoredTensor:
        shape = tuple(shape)
        if not isinstance(storage, _Storage) or not all(map(_is_natural, (start, *shape))):
            raise TypeError("a tensor has no storage or an impossible shape")
        if math.prod(max(size, 1) for size in shape) >= _MOST_ELEMENTS:
            raise ValueError(f"a tensor's shape {list(shape)} is too large")
        if start + math.prod(shape) > storage.num_elements:
            raise ValueError(f"a tensor of shape {list(shape)} lies outside of its storage")
        step = 1
        for size, stride in reversed(list(zip(shape, strides, strict=True))):
            if size > 1 and stride != step and math.prod(shape):
                raise ValueError(f"a tensor of shape {list(shape)} is not contiguous")
            step *= size
        offset = storage.offset + start * storage.dtype.itemsize
        return StoredTensor(self.path, offset, TensorInfo(shape, storage.dtype))

    def _parameter(self, tensor: StoredTensor, *_: Any) -> StoredTensor:
        return tensor

    def _typed(self, build: Any, _type: Any, arguments: Any, _state: Any) -> StoredTensor:
        if build not in (self._tensor, self._parameter):
            raise TypeError("a tensor is built by something else than a tensor's builder")
        return build(*arguments)


def _is_natural(number: Any) -> bool:
    return type(number) is int and number >= 0
