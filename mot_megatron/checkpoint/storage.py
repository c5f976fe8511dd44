"""Durable writing and safe reading of the files of torch.distributed.checkpoint.

The index of these files, ``.metadata``, is a pickle. It is unpickled here with only the few classes
that an index consists of, so that an untrusted checkpoint cannot run code. No Python objects are
stored besides tensors, because they would be pickles as well.
"""

from __future__ import annotations

import contextlib
import errno
import io
import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import IO, Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from tqdm import tqdm

from mot_megatron.checkpoint import agreement
from mot_megatron.errors import CheckpointError
from mot_megatron.files import read_regular_file, regular_file_size

INDEX_NAME = ".metadata"
_LONGEST_INDEX_BYTES = 1 << 30
_MOST_PIECES = 4096
"""Pieces of one tensor, far more than any layout writes."""

_INDEX_GLOBALS = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "Metadata",
            "TensorStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "MetadataIndex",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}
# Errors that unpickling damaged or malicious bytes may raise, according to the documentation of the
# pickle module and the checks below.
UNPICKLING_ERRORS = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    RecursionError,
    RuntimeError,
    TypeError,
    ValueError,
)


def own_file_pattern(rank: int) -> str:
    """Return a glob pattern for the tensor files that ``rank`` writes."""
    return f"__{rank}_*.distcp"


class Progress(Protocol):
    """Receives the progress of a write; a progress bar is one."""

    total: Any
    """Bytes that this rank writes, set when they are known."""

    def update(self, n: int) -> object:
        """Add ``n`` bytes that are being written."""
        ...


def write_tensors(
    directory: Path,
    described: dict[str, torch.Tensor],
    group: dist.ProcessGroup | None = None,
    progress: Progress | None = None,
) -> set[str]:
    """Write the tensors of all ranks and the index to ``directory``, and flush them to disk.

    Every rank calls this. A tensor that several ranks hold is written once. Each rank writes with
    one thread, because with several threads a failed write can go unreported.

    Args:
        directory: Existing folder on a file system that all ranks share.
        described: This rank's tensors; see ``describe``.
        group: Group of all ranks for the collectives; None for the default group.
        progress: Receives the number of bytes written; by default, the first rank shows a bar.

    Returns:
        The names of all tensors that were written, over all ranks; the same on every rank.

    Raises:
        CheckpointError: A file could not be written. Raised on every rank.
    """
    with contextlib.ExitStack() as stack:
        if progress is None:
            progress = stack.enter_context(progress_bar(f"saving {directory.name}"))
        if not dist.is_initialized():
            # Not otherwise: filters of warnings belong to all threads, and this may be the second.
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            index = save(
                described,
                storage_writer=_Writer(directory, thread_count=1, sync_files=True),
                planner=_SavePlanner(progress),
                process_group=group,
            )
        except CheckpointException as error:
            raise _translate(error) from error
    return set(index.state_dict_metadata)


def write_index(directory: Path, metadata: Metadata, results: Sequence[WriteResult]) -> None:
    """Write the index of tensor files that were written piece by piece, and flush it to disk.

    Args:
        directory: Folder of the files.
        metadata: The tensors and their pieces.
        results: Where every piece is.

    Raises:
        OSError: The index cannot be written.
    """
    _Writer(directory, sync_files=True).finish(metadata, [list(results)])


def read_index(directory: Path) -> Metadata:
    """Read ``.metadata`` and check that it lists only tensors, whole, in files of this directory.

    Every size that it states is compared to the files before any memory is allocated.

    Raises:
        CheckpointError: The file is missing, damaged or not an index of tensors, or a tensor or a
            part of one is not in the files.
    """
    return _checked_index(directory, lambda index: index)


def read_foreign_index(
    directory: Path, wanted: Callable[[str], bool]
) -> tuple[Metadata, tuple[str, ...]]:
    """Read an index that another program wrote, which may list more than the wanted tensors.

    Plans of a writer, which some programs store in it, and objects, which are pickles, are passed
    over; the tensors that remain are checked as in ``read_index``.

    Args:
        directory: Folder of ``.metadata``.
        wanted: Tells whether a tensor, by its name, is needed.

    Returns:
        The index of the wanted tensors, and the names of all other entries.

    Raises:
        CheckpointError: See ``read_index``.
    """
    others: list[str] = []

    def only_wanted(index: Metadata) -> Metadata:
        kept = {n: e for n, e in stored_tensors(index).items() if wanted(n)}
        others.extend(str(name) for name in index.state_dict_metadata if name not in kept)
        places = {at: place for at, place in index.storage_data.items() if at.fqn in kept}
        return Metadata(state_dict_metadata=dict(kept), storage_data=places)

    index = _checked_index(directory, only_wanted, _FOREIGN_CLASSES)
    return index, tuple(others)


def _checked_index(
    directory: Path,
    select: Callable[[Metadata], Metadata],
    more_classes: Mapping[tuple[str, str], type] | None = None,
) -> Metadata:
    try:
        content = read_regular_file(directory / INDEX_NAME, _LONGEST_INDEX_BYTES)
    except OSError as error:
        raise CheckpointError(f"{INDEX_NAME} cannot be read: {error.strerror}") from None
    try:
        check_pickle(content)
        index = _IndexUnpickler(io.BytesIO(content), more_classes or {}).load()
        _check_kind(index)
        index = select(index)
        _check_index(index)
        _check_pieces(index, _file_sizes(directory))
    except UNPICKLING_ERRORS as error:
        raise CheckpointError(f"{INDEX_NAME} is not an index of tensors: {error}") from None
    return index


def stored_tensors(index: Metadata) -> dict[str, TensorStorageMetadata]:
    """Return shape, dtype and pieces of every tensor in an index, by name."""
    return {
        name: entry
        for name, entry in index.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def check_complete(directory: Path, names: Iterable[str]) -> int:
    """Check that the files contain all of ``names`` in full, and return the number of tensors.

    Raises:
        CheckpointError: A tensor, part of a tensor, or a file is missing.
    """
    stored = stored_tensors(read_index(directory))
    check_written(names, stored)
    return len(stored)


def check_written(names: Iterable[str], written: Iterable[str]) -> None:
    """Check that ``written`` includes all of ``names``.

    Raises:
        CheckpointError: It does not.
    """
    missing = sorted(set(names) - set(written))
    if missing:
        raise CheckpointError(f"{len(missing)} tensors were not written, the first: {missing[0]}")


def read_tensors(directory: Path, index: Metadata, described: dict[str, torch.Tensor]) -> None:
    """Read this rank's part of each tensor into the memory of ``described``.

    No collectives; every rank reads independently.

    Raises:
        CheckpointError: A file is damaged or cannot be read.
    """
    with progress_bar(f"loading {directory.name}") as progress, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            load(
                described,
                storage_reader=_Reader(directory, index),
                planner=_LoadPlanner(progress),
                no_dist=True,
            )
        except CheckpointException as error:
            raise _translate(error, reading=True) from error


class _IndexUnpickler(pickle.Unpickler):
    """An unpickler that accepts only the classes of an index and rejects others before any call."""

    def __init__(self, stream: IO[bytes], more_classes: Mapping[tuple[str, str], type]) -> None:
        super().__init__(stream)
        self._more_classes = more_classes

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._more_classes:
            return self._more_classes[module, name]
        if (module, name) in _INDEX_GLOBALS:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no index needs")


class _Ignored:
    """Stands in for an object that an index contains and nobody needs; it keeps nothing."""

    def __new__(cls, *_args: object) -> _Ignored:
        return super().__new__(cls)

    def __init__(self, *_args: object) -> None:
        pass

    def __setstate__(self, _state: object) -> None:
        pass


_PLANNER = "torch.distributed.checkpoint.planner"
_MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"
_FOREIGN_CLASSES: dict[tuple[str, str], type] = {
    ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"): BytesStorageMetadata,
    ("torch.distributed.checkpoint.metadata", "StorageMeta"): _Ignored,
    (_MEGATRON, "MCoreMetadata"): Metadata,
    (_MEGATRON, "MCoreSavePlan"): _Ignored,
    (_PLANNER, "SavePlan"): _Ignored,
    (_PLANNER, "WriteItem"): _Ignored,
    (_PLANNER, "WriteItemType"): _Ignored,
    (_PLANNER, "TensorWriteData"): _Ignored,
    (_PLANNER, "BytesIOWriteData"): _Ignored,
    ("pathlib", "PosixPath"): _Ignored,
}
"""What an index of another program also refers to, and what it becomes here."""


def _enum_member(enumeration: Any, name: str) -> Enum | _Ignored:
    """Stand in for ``getattr``, with which Python 3.11.0 to 3.11.3 pickle members of enumerations.

    Nothing but members of enumerations can be looked up.
    """
    if enumeration is _Ignored:
        return _Ignored()
    if not (isinstance(enumeration, type) and issubclass(enumeration, Enum)):
        raise pickle.UnpicklingError(f"it calls getattr on {enumeration!r}")
    return enumeration[name]


def check_pickle(content: bytes) -> None:
    """Check that unpickling ``content`` allocates no more than its own size suggests.

    The index of a memo entry may be any number, and the memo is as long as the largest.
    """
    for operation, argument, _ in pickletools.genops(content):
        is_memo_entry = operation.name in ("PUT", "BINPUT", "LONG_BINPUT")
        if is_memo_entry and isinstance(argument, int) and argument > len(content):
            raise ValueError(f"memo entry {argument} in {len(content)} bytes")


def _check_kind(index: Any) -> None:
    if not isinstance(index, Metadata) or not isinstance(index.storage_data, dict):
        raise TypeError(f"it contains a {type(index).__name__}")


def _check_index(index: Metadata) -> None:
    for name, entry in index.state_dict_metadata.items():
        if not isinstance(name, str):
            raise TypeError(f"a tensor is named {name!r}")
        if not isinstance(entry, TensorStorageMetadata):
            raise TypeError(f"{name} is a {type(entry).__name__}, not a tensor")
    for place in index.storage_data.values():
        file_name = place.relative_path
        if Path(file_name).name != file_name or not file_name.endswith(".distcp"):
            raise ValueError(f"it points to {file_name}, which is not one of its tensor files")


def _file_sizes(directory: Path) -> dict[str, int]:
    sizes = {}
    for path in directory.glob("*.distcp"):
        try:
            sizes[path.name] = regular_file_size(path)
        except OSError as error:
            raise ValueError(f"{path.name}: {error.strerror}") from None
    return sizes


def _check_pieces(index: Metadata, sizes: dict[str, int]) -> None:
    """Check that the pieces of each tensor cover it once, and that the files are as long as them.

    Raises:
        ValueError: They do not.
    """
    for name, tensor in stored_tensors(index).items():
        if len(tensor.chunks) > _MOST_PIECES:
            raise ValueError(f"{name} has {len(tensor.chunks)} pieces")
        boxes = [tuple(zip(chunk.offsets, chunk.sizes, strict=True)) for chunk in tensor.chunks]
        for box in boxes:
            if len(box) != len(tensor.size) or not all(
                min(start, length) >= 0 and start + length <= whole
                for (start, length), whole in zip(box, tensor.size, strict=True)
            ):
                raise ValueError(f"a piece of {name} lies outside of it")
        if sum(chunk.sizes.numel() for chunk in tensor.chunks) != tensor.size.numel():
            raise ValueError(f"only part of {name} is in the files")
        if any(_overlap(one, other) for at, one in enumerate(boxes) for other in boxes[:at]):
            raise ValueError(f"pieces of {name} overlap")
        itemsize = tensor.properties.dtype.itemsize
        for chunk in tensor.chunks:
            place = index.storage_data.get(MetadataIndex(name, chunk.offsets))
            if (
                place is None
                or place.offset < 0
                or sizes.get(place.relative_path, -1) < place.offset + place.length
                or place.length < chunk.sizes.numel() * itemsize
            ):
                raise ValueError(
                    f"part of {name} is missing from the files; every rank must write to the same"
                    " directory, on a file system that all ranks share"
                )


def _overlap(one: tuple[tuple[int, int], ...], other: tuple[tuple[int, int], ...]) -> bool:
    """Return whether two boxes, (start, length) for each dimension, share an element."""
    return all(
        start < other_start + other_length and other_start < start + length
        for (start, length), (other_start, other_length) in zip(one, other, strict=True)
    )


def cause_of_failed_write(error: RuntimeError) -> OSError | None:
    """Return the OSError that made torch.save fail; None if it was something else.

    torch.save reports positions in the half-written archive, and has the cause as context alone.
    """
    context = error.__context__
    while context is not None and not isinstance(context, OSError):
        context = context.__context__
    return None if context is None else OSError(context.errno, context.strerror)


class _Writer(FileSystemWriter):
    """A writer that reports the cause of a failed write and omits storage metadata from the index.

    Otherwise that cause would not reach the other ranks. The storage metadata would contain a path
    of this machine and a random number.
    """

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            cause = cause_of_failed_write(error)
            if cause is None:
                raise
            raise cause from error

    def storage_meta(self) -> StorageMeta | None:
        return None


class _Reader(FileSystemReader):
    """A reader for an index that has already been read.

    The base class would unpickle ``.metadata`` without restrictions and, if that failed, per-rank
    index files. torch requests the latter only if the signature of ``read_metadata`` has
    ``kwargs``.
    """

    def __init__(self, directory: Path, index: Metadata) -> None:
        super().__init__(directory)
        self.index = index

    def read_metadata(self) -> Metadata:  # type: ignore[override]
        return self.index

    def _slice_file(self, file: IO[bytes], sinfo: Any) -> IO[bytes]:
        return open_piece(file, sinfo)


def open_piece(file: IO[bytes], place: Any) -> IO[bytes]:
    """Return a piece of a file, which torch.save wrote as an archive without compression.

    Args:
        file: A tensor file.
        place: The index's record of where the piece is in the file.

    Raises:
        pickle.UnpicklingError: The piece is no such archive.
    """
    piece = io.BufferedReader(_Piece(file, place.offset, place.length))
    try:
        with zipfile.ZipFile(piece) as archive:
            check_members(archive, place.length)
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise pickle.UnpicklingError(f"{place.relative_path} is damaged: {error}") from None
    except pickle.UnpicklingError as error:
        raise pickle.UnpicklingError(f"{place.relative_path} {error}") from None
    piece.seek(0)
    return piece


def check_members(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """Return the members of an archive of ``size`` bytes that torch.save wrote, by name.

    Raises:
        pickle.UnpicklingError: It has compressed or duplicate members, as torch.save never writes.
    """
    members = archive.infolist()
    # Compressed members could be larger by any factor.
    if sum(member.file_size for member in members) > size or any(
        member.compress_type != zipfile.ZIP_STORED for member in members
    ):
        raise pickle.UnpicklingError("contains compressed data")
    by_name = {member.filename: member for member in members}
    if len(by_name) < len(members):
        raise pickle.UnpicklingError("contains two members of the same name")
    return by_name


class _Piece(io.RawIOBase):
    """A part of a file as a file; torch's own view cannot be searched from its end."""

    def __init__(self, file: IO[bytes], offset: int, length: int) -> None:
        self._file, self._offset, self._length = file, offset, length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        if start + offset < 0:
            raise OSError(errno.EINVAL, "before the beginning")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        self._file.seek(self._offset + self._position)
        read = self._file.readinto(view[: max(0, self._length - self._position)])  # type: ignore[attr-defined]
        self._position += read
        return read


class _SavePlanner(DefaultSavePlanner):
    """The default planner, with the progress of the bytes written."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(flatten_state_dict=False)
        self.progress = progress

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        self.progress.total = sum(item.tensor_storage_size() or 0 for item in new_plan.items)
        return super().finish_plan(new_plan)

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        data = super().resolve_data(write_item)
        if not isinstance(data, torch.Tensor):
            raise TypeError(f"{write_item.index.fqn}: only tensors are stored, never pickles")
        self.progress.update(data.numel() * data.element_size())
        return data


class _LoadPlanner(DefaultLoadPlanner):
    """The default planner, with a progress bar of the elements read and without unpickling."""

    def __init__(self, progress: tqdm) -> None:
        super().__init__(flatten_state_dict=False)
        self.progress = progress

    def finish_plan(self, new_plan: LoadPlan) -> LoadPlan:
        self.progress.total = sum(item.lengths.numel() for item in new_plan.items)
        return super().finish_plan(new_plan)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name, size = read_item.storage_index.fqn, len(value.read())
        raise TypeError(f"{name} is stored as a pickle of {size} bytes, not as a tensor")

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        super().commit_tensor(read_item, tensor)
        self.progress.update(read_item.lengths.numel())


def progress_bar(description: str, total: int | None = None, unit: str = "it") -> tqdm:
    """Return a bar of bytes or elements, which the first rank shows if it lasts some seconds."""
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        unit_scale=True,
        delay=5,
        ncols=100,
        leave=False,
        disable=agreement.rank() != 0,
    )


def _translate(error: CheckpointException, reading: bool = False) -> Exception:
    """Map I/O failures, and damaged files when reading, to CheckpointError.

    Any other failure is a defect and becomes a RuntimeError.
    """
    foreseen = (OSError, *UNPICKLING_ERRORS) if reading else (OSError,)
    for failed_rank, (cause, _) in sorted(error.failures.items()):
        if not isinstance(cause, foreseen):
            continue
        reason = agreement.describe_os_error(cause) if isinstance(cause, OSError) else str(cause)
        where = f" (rank {failed_rank})" if agreement.world_size() > 1 and not reading else ""
        return CheckpointError(reason.splitlines()[0] + where)
    return RuntimeError("torch.distributed.checkpoint failed")
