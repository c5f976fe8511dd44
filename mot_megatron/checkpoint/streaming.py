"""Tensor files written and read piece by piece, by one process without collectives.

``write_file`` and ``write_index_of`` write what torch.distributed.checkpoint would write, with one
piece in memory at a time; ``read_box`` reads any box of a tensor, and from the files only the pages
with its values.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import torch
from torch.distributed.checkpoint._dedup_save_plans import dedup_save_plans
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult

from mot_megatron.checkpoint.agreement import describe_os_error
from mot_megatron.checkpoint.manifest import FileRecord
from mot_megatron.checkpoint.storage import (
    UNPICKLING_ERRORS,
    cause_of_failed_write,
    open_piece,
    write_index,
)
from mot_megatron.errors import CheckpointError

_LOCAL_HEADER = struct.Struct("<26xHH")
"""Of a member of a zip archive: the lengths of its name and of the extra field after it."""


@dataclass(frozen=True)
class Piece:
    """A box of one tensor, which a tensor file stores as one entry."""

    name: str
    """Name of the tensor."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    dtype: torch.dtype
    offsets: tuple[int, ...]
    """First index of the box in each dimension."""
    sizes: tuple[int, ...]
    """Shape of the box."""

    @classmethod
    def whole(cls, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Piece:
        """Return the piece that is a whole tensor."""
        return cls(name, shape, dtype, (0,) * len(shape), shape)

    @property
    def num_bytes(self) -> int:
        """Size of the values in bytes."""
        return torch.Size(self.sizes).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class WrittenFile:
    """A tensor file that is complete and on disk."""

    name: str
    record: FileRecord
    pieces: tuple[Piece, ...]
    spans: tuple[tuple[int, int], ...]
    """Offset and length in bytes of every piece in the file."""


def write_file(
    path: Path,
    pieces: Sequence[Piece],
    produce: Callable[[Piece], torch.Tensor],
    written: Callable[[int], object],
) -> WrittenFile:
    """Write one tensor file, each piece when it has been produced, and flush it to disk.

    Args:
        path: A new file.
        pieces: In the order of the file.
        produce: Returns the values of a piece, on the CPU.
        written: Called with the size of every piece that has been written, in bytes.

    Raises:
        CheckpointError: The file cannot be written.
    """
    spans = []
    try:
        with path.open("xb") as stream:
            hashing = _HashingStream(stream)
            for piece in pieces:
                start = hashing.size
                _save_piece(produce(piece), piece, hashing)
                spans.append((start, hashing.size - start))
                written(piece.num_bytes)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise CheckpointError(describe_os_error(error)) from error
    return WrittenFile(path.name, hashing.record(), tuple(pieces), tuple(spans))


def divide(pieces_of_ranks: Sequence[Sequence[Piece]]) -> list[list[Piece]]:
    """Give every piece that several ranks hold to one of them, as saving in parallel does."""
    plans = [SavePlan([_write_item(piece) for piece in pieces]) for pieces in pieces_of_ranks]
    divided = []
    for pieces, plan in zip(pieces_of_ranks, dedup_save_plans(plans), strict=True):
        kept = {item.index for item in plan.items}
        divided.append([piece for piece in pieces if _index_of(piece) in kept])
    return divided


def write_index_of(
    directory: Path,
    files: Iterable[WrittenFile],
    objects: Mapping[str, tuple[str, int, int]] | None = None,
) -> None:
    """Write the index of the tensors in ``files`` and flush it to disk.

    Args:
        directory: Folder of the files.
        files: All tensor files.
        objects: By name, where other programs find objects: file, offset and length in bytes.

    Raises:
        CheckpointError: The index cannot be written.
    """
    listed = list(files)
    plans, metadata = create_default_global_save_plan(
        [SavePlan([_write_item(piece) for piece in file.pieces]) for file in listed]
    )
    results = [
        WriteResult(item.index, length, _StorageInfo(file.name, start, length))
        for file, plan in zip(listed, plans, strict=True)
        for item, (start, length) in zip(plan.items, file.spans, strict=True)
    ]
    for name, place in (objects or {}).items():
        metadata.state_dict_metadata[name] = BytesStorageMetadata()
        results.append(WriteResult(MetadataIndex(name), place[2], _StorageInfo(*place)))
    try:
        write_index(directory, metadata, results)
    except OSError as error:
        raise CheckpointError(describe_os_error(error)) from error


def read_box(
    directory: Path,
    index: Metadata,
    name: str,
    offsets: Sequence[int],
    sizes: Sequence[int],
) -> torch.Tensor:
    """Read a box of a tensor of a verified checkpoint into new memory.

    Args:
        directory: Folder of the checkpoint.
        index: Result of ``read_index``.
        name: Name of a stored tensor.
        offsets: First index of the box in each dimension.
        sizes: Shape of the box.

    Raises:
        CheckpointError: A file is damaged or cannot be read.
    """
    stored = index.state_dict_metadata[name]
    assert isinstance(stored, TensorStorageMetadata)  # as read_index has checked
    box = torch.empty(tuple(sizes), dtype=stored.properties.dtype)
    values = _as_bytes(box)
    for chunk in stored.chunks:
        ours, theirs = _overlap(offsets, sizes, chunk)
        if ours is None or theirs is None:
            continue
        place = index.storage_data[MetadataIndex(name, chunk.offsets)]
        try:
            with (directory / place.relative_path).open("rb") as file:
                piece = _map_piece(file, place, chunk.sizes, box.dtype)
                _cut(values, ours, box.dtype).copy_(_cut(piece, theirs, box.dtype))
                del piece  # unmap it
        except OSError as error:
            raise CheckpointError(describe_os_error(error)) from error
        except UNPICKLING_ERRORS as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"{place.relative_path}: {name} is damaged: {reason}") from None
    return box


class _HashingStream:
    """A stream that counts and hashes what is written to it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._digest, self.size = stream, hashlib.sha256(), 0

    def write(self, content: bytes) -> int:
        self._stream.write(content)
        self._digest.update(content)
        self.size += len(content)
        return len(content)

    def flush(self) -> None:
        self._stream.flush()

    def record(self) -> FileRecord:
        return FileRecord(size=self.size, sha256=self._digest.hexdigest())


def _save_piece(values: torch.Tensor, piece: Piece, stream: _HashingStream) -> None:
    if tuple(values.shape) != piece.sizes or values.dtype != piece.dtype:
        raise ValueError(
            f"{piece.name} was produced as {tuple(values.shape)} {values.dtype}, expected"
            f" {piece.sizes} {piece.dtype}"
        )
    if values.untyped_storage().nbytes() != piece.num_bytes or not values.is_contiguous():
        values = values.contiguous().clone()  # torch.save writes the whole storage
    try:
        torch.save(values.detach(), cast("IO[bytes]", stream))  # it only writes
    except RuntimeError as error:
        cause = cause_of_failed_write(error)
        if cause is None:
            raise
        raise cause from error


def _index_of(piece: Piece) -> MetadataIndex:
    return MetadataIndex(piece.name, torch.Size(piece.offsets))


def _write_item(piece: Piece) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.sizes))
    properties = TensorProperties(dtype=piece.dtype)
    data = TensorWriteData(chunk=chunk, properties=properties, size=torch.Size(piece.shape))
    kind = WriteItemType.TENSOR if piece.sizes == piece.shape else WriteItemType.SHARD
    return WriteItem(index=_index_of(piece), type=kind, tensor_data=data)


_Span = tuple[int, int]
"""First index and length in one dimension."""


def _overlap(
    offsets: Sequence[int], sizes: Sequence[int], chunk: ChunkStorageMetadata
) -> tuple[list[_Span] | None, list[_Span] | None]:
    """Return where a box and a chunk overlap, relative to each; None if they do not."""
    ours, theirs = [], []
    for start, size, first, length in zip(offsets, sizes, chunk.offsets, chunk.sizes, strict=True):
        begin, end = max(start, first), min(start + size, first + length)
        if begin >= end:
            return None, None
        ours.append((begin - start, end - begin))
        theirs.append((begin - first, end - begin))
    return ours, theirs


def _as_bytes(values: torch.Tensor) -> torch.Tensor:
    """View contiguous values as bytes: the last dimension grows by the size of an element."""
    return (values if values.dim() else values.unsqueeze(0)).view(torch.uint8)


def _cut(values: torch.Tensor, spans: Sequence[_Span], dtype: torch.dtype) -> torch.Tensor:
    """Return a box of values that are viewed as bytes."""
    for dimension, (start, length) in enumerate(spans):
        unit = dtype.itemsize if dimension == len(spans) - 1 else 1
        values = values.narrow(dimension, start * unit, length * unit)
    return values


def _map_piece(
    file: IO[bytes], place: _StorageInfo, sizes: torch.Size, dtype: torch.dtype
) -> torch.Tensor:
    """Map a stored piece into memory, as bytes; its pages are read when they are used."""
    piece = open_piece(file, place)
    described = torch.load(piece, map_location="meta", weights_only=True)
    expected = sizes.numel() * dtype.itemsize
    if not (
        isinstance(described, torch.Tensor)
        and (described.shape, described.dtype) == (sizes, dtype)
        and described.is_contiguous()
        and described.storage_offset() == 0
    ):
        raise ValueError("its entry is another tensor than in the index")
    piece.seek(0)
    with zipfile.ZipFile(piece) as archive:
        data = [member for member in archive.infolist() if "/data/" in member.filename]
        order = [member for member in archive.infolist() if member.filename.endswith("/byteorder")]
        if len(data) != 1 or data[0].file_size != expected:
            raise ValueError("its entry has another size than in the index")
        if order and archive.read(order[0]) != b"little":
            raise ValueError("its bytes are in an order other than little-endian")
    piece.seek(data[0].header_offset)
    lengths = _LOCAL_HEADER.unpack(piece.read(_LOCAL_HEADER.size))
    start = data[0].header_offset + _LOCAL_HEADER.size + sum(lengths)
    if start + expected > place.length:
        raise ValueError("its entry is cut short")
    start += place.offset
    begin = start - start % mmap.ALLOCATIONGRANULARITY
    length = start + expected - begin
    pages = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY, offset=begin)
    flat = torch.frombuffer(pages, dtype=torch.uint8, count=expected, offset=start - begin)
    return flat.view(*sizes[:-1], sizes[-1] * dtype.itemsize) if sizes else flat
