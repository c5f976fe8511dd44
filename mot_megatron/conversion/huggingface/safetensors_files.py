"""Safetensors files, read safely and written one tensor at a time.

A file is an 8-byte little-endian length, that many bytes of JSON, and the values of all tensors;
an index lists the tensors of several files. The safetensors library checks the JSON against the
file when it opens one. It reads through a mapping of the whole file, whose pages count as memory,
and it writes all tensors of a file at once; therefore values are read and written here.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open

from mot_megatron.checkpoint.manifest import FileRecord
from mot_megatron.conversion.tensors import OutputTensor, TensorInfo
from mot_megatron.errors import CheckpointError
from mot_megatron.files import read_regular_file, regular_file_size

SUFFIX = ".safetensors"
INDEX_SUFFIX = SUFFIX + ".index.json"
_LENGTH = struct.Struct("<Q")
_LONGEST_HEADER_BYTES = 1 << 25
"""Limit for a file's JSON, enough for 200,000 tensors."""
_LONGEST_INDEX_BYTES = 1 << 25
_MOST_ELEMENTS = 1 << 60
"""Limit for the product of a shape, zeros not counted, which torch computes for strides."""
_ALIGNMENT = 8
"""The library aligns the first value to this many bytes."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Data types of the format that a tensor of weights or indices may have."""
_NAME_OF_DTYPE = {dtype: name for name, dtype in DTYPES.items()}
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class _Place:
    """Where a tensor's values are."""

    path: Path
    offset: int
    """From the start of the file, in bytes."""
    info: TensorInfo


class SafetensorsSource:
    """The tensors of a folder of safetensors files, read when they are asked for."""

    def __init__(self, directory: Path, stem: str = "model") -> None:
        """Open and check the headers of all files.

        Args:
            directory: Folder with ``STEM.safetensors``, or with ``STEM.safetensors.index.json`` and
                the files that it lists.
            stem: Beginning of the files' names.

        Raises:
            CheckpointError: There is no such file, or a header or the index is damaged.
        """
        self.directory = directory
        self._places: dict[str, _Place] = {}
        index = directory / (stem + INDEX_SUFFIX)
        path = directory / (stem + SUFFIX)
        if index.is_file():
            self._open_indexed(index)
        elif path.is_file():
            self._places = _places(path)
        else:
            raise CheckpointError(_absent(directory, stem))
        self.infos = {name: place.info for name, place in self._places.items()}

    def read(self, name: str) -> torch.Tensor:
        """Read a whole tensor into new memory.

        Raises:
            CheckpointError: The file cannot be read, or has changed since its header was.
        """
        if name not in self._places:
            raise CheckpointError(f"{self.directory}: it lacks {name}")
        place = self._places[name]
        values = bytearray(place.info.num_bytes)
        try:
            with place.path.open("rb") as file:
                file.seek(place.offset)
                complete = file.readinto(values) == len(values)  # type: ignore[attr-defined]
        except OSError as error:
            raise CheckpointError(f"{place.path} cannot be read: {error.strerror}") from None
        if not complete:
            raise CheckpointError(f"{place.path} is shorter than it was")
        if not values:
            return torch.empty(place.info.shape, dtype=place.info.dtype)
        return torch.frombuffer(values, dtype=place.info.dtype).view(place.info.shape)

    def _open_indexed(self, index: Path) -> None:
        files = _read_index(index)
        for name, file in files.items():
            if Path(file).name != file or not file.endswith(SUFFIX):
                raise CheckpointError(
                    f"{index}: tensor {name!r} is in {file!r}; allowed: the name of a {SUFFIX} file"
                    " in the same folder"
                )
        for file in dict.fromkeys(files.values()):
            for name, place in _places(self.directory / file).items():
                if files.get(name) != file:
                    raise CheckpointError(
                        f"{self.directory / file} contains {name!r}, but {index.name} says"
                        f" {files.get(name, 'nothing of it')!r}"
                    )
                self._places[name] = place
        missing = sorted(files.keys() - self._places.keys())
        if missing:
            raise CheckpointError(
                f"{index}: {len(missing)} tensors are not in their files, the first: {missing[0]!r}"
            )


def _absent(directory: Path, stem: str) -> str:
    if not directory.is_dir():
        return f"{directory}: no such folder"
    pickles = sorted(p.name for p in directory.iterdir() if p.suffix in PICKLE_SUFFIXES)
    allowed = f"allowed: {stem}{SUFFIX}, or {stem}{INDEX_SUFFIX} and the files that it lists"
    if pickles:
        return (
            f"{directory}: {pickles[0]} is a pickle, which can run any program and is never read;"
            f" {allowed}"
        )
    return f"{directory} contains no weights in the safetensors format; {allowed}"


def _read_index(path: Path) -> dict[str, str]:
    files = _parse(_read(path, _LONGEST_INDEX_BYTES), path).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise CheckpointError(f"{path}: weight_map is not a table of file names")
    return files


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that contains one object, without duplicate keys.

    Raises:
        CheckpointError: The file cannot be read, is too long, or contains something else.
    """
    return _parse(_read(path, _LONGEST_INDEX_BYTES), path)


def _read(path: Path, at_most: int) -> bytes:
    try:
        return read_regular_file(path, at_most)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def _parse(content: bytes, path: Path) -> dict[str, Any]:
    try:
        document = json.loads(content, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not legal JSON: {error}") from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: it contains a {type(document).__name__}, not an object")
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"{twice!r} occurs twice")
    return unique


def _places(path: Path) -> dict[str, _Place]:
    """Read and check a file's header.

    Raises:
        CheckpointError: The header does not describe the file exactly.
    """
    try:
        size = regular_file_size(path)
        with path.open("rb") as file:
            start, header = _header(file, size)
        with safe_open(path, framework="pt"):
            pass  # the library checks that tensors fill the file without gaps or overlaps
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: not a safetensors file: {error}") from None
    document = _parse(header, path)
    document.pop("__metadata__", None)
    places = {}
    for name, entry in document.items():
        try:
            places[name] = _place(path, start, size, entry)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: tensor {name!r}: {error}") from None
    return places


def _header(file: IO[bytes], size: int) -> tuple[int, bytes]:
    """Return where the values start, and the JSON before them."""
    prefix = file.read(_LENGTH.size)
    if len(prefix) < _LENGTH.size:
        raise ValueError("it is too short")
    (length,) = _LENGTH.unpack(prefix)
    start = _LENGTH.size + length
    if start > size:
        raise ValueError(f"its header claims {length} bytes, but the file has {size}")
    if length > _LONGEST_HEADER_BYTES:
        raise ValueError(f"its header has {length} bytes; allowed: {_LONGEST_HEADER_BYTES}")
    return start, file.read(length)


def _place(path: Path, start: int, size: int, entry: Mapping[str, Any]) -> _Place:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"its type is {entry['dtype']!r}; allowed: {', '.join(DTYPES)}")
    info = TensorInfo(tuple(entry["shape"]), DTYPES[entry["dtype"]])
    first, last = entry["data_offsets"]
    if not all(isinstance(each, int) and each >= 0 for each in (*info.shape, first, last)):
        raise ValueError("a size or offset is not a natural number")
    if math.prod(max(size, 1) for size in info.shape) >= _MOST_ELEMENTS:
        raise ValueError(f"its shape {list(info.shape)} is too large")
    if last - first != info.num_bytes or start + last > size:
        raise ValueError(f"its {info.num_bytes} bytes are not in the file")
    return _Place(path, start + first, info)


@dataclass(frozen=True)
class Shard:
    """A file to write."""

    name: str
    outputs: tuple[OutputTensor, ...]


def plan_shards(outputs: Sequence[OutputTensor], shard_bytes: int) -> list[Shard]:
    """Distribute tensors, in order, over files of at most ``shard_bytes``, or one tensor each."""
    groups: list[list[OutputTensor]] = [[]]
    size = 0
    for output in outputs:
        if groups[-1] and size + output.info.num_bytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(output)
        size += output.info.num_bytes
    if len(groups) == 1:
        return [Shard("model" + SUFFIX, tuple(groups[0]))]
    return [
        Shard(f"model-{number:05d}-of-{len(groups):05d}{SUFFIX}", tuple(group))
        for number, group in enumerate(groups, start=1)
    ]


def index_of(shards: Sequence[Shard]) -> dict[str, Any]:
    """Return the content of the index of several files."""
    outputs = [output for shard in shards for output in shard.outputs]
    return {
        "metadata": {
            "total_size": sum(output.info.num_bytes for output in outputs),
            "total_parameters": sum(math.prod(output.info.shape) for output in outputs),
        },
        "weight_map": {output.name: shard.name for shard in shards for output in shard.outputs},
    }


def write_shard(directory: Path, shard: Shard, written: Callable[[int], object]) -> FileRecord:
    """Write one file, each tensor when it has been produced, and flush it to disk.

    Args:
        directory: Folder of the file, which must be new.
        shard: The file.
        written: Called with the size of every tensor that has been written, in bytes.

    Raises:
        OSError: The file cannot be written.
        UserError: A tensor cannot be produced.
    """
    digest, size = hashlib.sha256(), 0
    with (directory / shard.name).open("xb") as file:
        for chunk in _chunks(shard, written):
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(size=size, sha256=digest.hexdigest())


def _chunks(shard: Shard, written: Callable[[int], object]) -> Iterator[bytes | memoryview]:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for output in shard.outputs:
        end = offset + output.info.num_bytes
        entries[output.name] = {
            "dtype": _NAME_OF_DTYPE[output.info.dtype],
            "shape": list(output.info.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    yield _LENGTH.pack(len(header)) + header
    for output in shard.outputs:
        values = output.produce().contiguous()
        if TensorInfo(tuple(values.shape), values.dtype) != output.info:
            raise ValueError(f"{output.name} is {values.dtype} {tuple(values.shape)}")
        yield values.view(-1).view(torch.uint8).numpy().data
        written(output.info.num_bytes)
