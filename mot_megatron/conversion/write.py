"""Stream tensors into a checkpoint of this program."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

from mot_megatron.checkpoint.agreement import describe_os_error
from mot_megatron.checkpoint.commit import UnfinishedSave, documents_of
from mot_megatron.checkpoint.find import CheckpointInfo
from mot_megatron.checkpoint.storage import progress_bar, read_index
from mot_megatron.checkpoint.streaming import (
    Piece,
    WrittenFile,
    read_box,
    write_file,
    write_index_of,
)
from mot_megatron.conversion.tensors import OutputTensor, size_text
from mot_megatron.errors import CheckpointError

T = TypeVar("T")
FILE_BYTES = 4 << 30
"""Size at which a new tensor file is begun, unless the layout determines the files."""


def write_checkpoint(
    directory: Path,
    outputs: Sequence[OutputTensor],
    *,
    step: int,
    metadata: Mapping[str, Any],
    config_text: str,
    file_bytes: int = FILE_BYTES,
    workers: int = 1,
    verify: bool = False,
) -> CheckpointInfo:
    """Write tensors, each produced when it is written, as the checkpoint of ``step``.

    Args:
        directory: Folder of checkpoints, created if missing.
        outputs: The tensors, in the order of the files.
        step: Number of optimizer steps completed.
        metadata: Everything else, serializable as JSON.
        config_text: The resolved configuration as TOML.
        file_bytes: Size at which a new tensor file is begun.
        workers: Number of files that are written at a time, each by a thread.
        verify: Read the files back and compare them with tensors that are produced again.

    Raises:
        CheckpointError: The directory has a checkpoint of that step, there is too little space, or
            a file could not be written; nothing is left behind.
        UserError: A tensor could not be produced; nothing is left behind.
    """
    by_name = {output.name: output for output in outputs}
    if len(by_name) != len(outputs):
        raise ValueError("two output tensors have the same name")
    pieces = [Piece.whole(o.name, o.info.shape, o.info.dtype) for o in outputs]
    return write_pieces(
        directory,
        {
            f"__0_{number}.distcp": part
            for number, part in enumerate(split_into_files(pieces, file_bytes))
        },
        lambda piece: by_name[piece.name].produce(),
        step=step,
        metadata=metadata,
        config_text=config_text,
        workers=workers,
        verify=verify,
    )


def write_pieces(
    directory: Path,
    files: Mapping[str, Sequence[Piece]],
    produce: Callable[[Piece], torch.Tensor],
    *,
    step: int,
    metadata: Mapping[str, Any],
    config_text: str,
    workers: int = 1,
    verify: bool = False,
) -> CheckpointInfo:
    """Write tensor files, each piece produced when it is written, as the checkpoint of ``step``.

    Args:
        directory: Folder of checkpoints, created if missing.
        files: The pieces of each file, by its name.
        produce: Returns the values of a piece, on the CPU; called by ``workers`` threads.
        step: Number of optimizer steps completed.
        metadata: Everything else, serializable as JSON.
        config_text: The resolved configuration as TOML.
        workers: Number of files that are written at a time, each by a thread.
        verify: Read the files back and compare them with pieces that are produced again.

    Raises:
        UserError: See ``write_checkpoint``.
    """
    save = UnfinishedSave(directory, step)
    total = sum(piece.num_bytes for pieces in files.values() for piece in pieces)
    check_destination(directory, step, total)
    documents = documents_of(metadata, config_text)
    try:
        save.begin(save.final.name)
        written = _write_files(save.temporary, files, produce, workers, total)
        write_index_of(save.temporary, written)
        if verify:
            _compare_files(save.temporary, written, produce, workers, total)
        names = {piece.name for file in written for piece in file.pieces}
        return save.complete(names, {file.name: file.record for file in written}, documents)
    except OSError as error:
        raise CheckpointError(f"cannot write {save.final}: {describe_os_error(error)}") from error
    except CheckpointError as error:
        raise CheckpointError(f"cannot write {save.final}: {error}") from error
    finally:
        save.discard()  # after the rename there is nothing to discard


def check_destination(directory: Path, step: int, num_bytes: int) -> None:
    """Check that a folder of checkpoints can take one of ``step``; none is ever replaced.

    Raises:
        CheckpointError: It has one, is no folder, or its file system has too little space.
    """
    final = UnfinishedSave(directory, step).final
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory} is not a folder; give a folder of checkpoints")
    if final.exists():
        raise CheckpointError(f"{final} exists; give another folder, or move it away")
    check_space(directory, num_bytes)


def check_space(directory: Path, num_bytes: int) -> None:
    """Check that there is space for a folder, which may not exist yet.

    Raises:
        CheckpointError: Its file system has too little.
    """
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise CheckpointError(
            f"{directory} needs {size_text(num_bytes)}, of which {size_text(free)} are free"
        )


def _write_files(
    temporary: Path,
    files: Mapping[str, Sequence[Piece]],
    produce: Callable[[Piece], torch.Tensor],
    workers: int,
    total: int,
) -> list[WrittenFile]:
    with progress_bar(f"writing {temporary.stem}", total, unit="B") as progress:
        return _in_parallel(
            workers,
            lambda item: write_file(temporary / item[0], item[1], produce, progress.update),
            list(files.items()),
        )


def _compare_files(
    temporary: Path,
    written: Sequence[WrittenFile],
    produce: Callable[[Piece], torch.Tensor],
    workers: int,
    total: int,
) -> None:
    index = read_index(temporary)

    def compare(file: WrittenFile) -> None:
        for piece in file.pieces:
            stored = read_box(temporary, index, piece.name, piece.offsets, piece.sizes)
            if not equal_bits(stored, produce(piece)):
                raise CheckpointError(f"{file.name}: {piece.name} was not stored as it was written")
            progress.update(piece.num_bytes)

    with progress_bar(f"comparing {temporary.stem}", total, unit="B") as progress:
        _in_parallel(workers, compare, written)


def equal_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two contiguous tensors have the same shape, dtype and bits, NaN included."""
    return (one.shape, one.dtype) == (other.shape, other.dtype) and torch.equal(
        one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
    )


def _in_parallel(workers: int, work: Callable[[Any], T], items: Sequence[Any]) -> list[T]:
    """Call ``work`` on every item; after an error, no further item is begun."""
    with ThreadPoolExecutor(workers) as pool:
        try:
            return list(pool.map(work, items))
        finally:
            pool.shutdown(cancel_futures=True)


def split_into_files(pieces: Sequence[Piece], file_bytes: int) -> Iterator[list[Piece]]:
    """Yield the pieces of each file: as many as ``file_bytes`` take, but at least one."""
    part: list[Piece] = []
    size = 0
    for piece in pieces:
        if part and size + piece.num_bytes > file_bytes:
            yield part
            part, size = [], 0
        part.append(piece)
        size += piece.num_bytes
    if part:
        yield part
