"""Stream tensors into a checkpoint of this program."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mot_megatron.checkpoint.agreement import describe_os_error
from mot_megatron.checkpoint.commit import UnfinishedSave, documents_of
from mot_megatron.checkpoint.find import CheckpointInfo
from mot_megatron.checkpoint.storage import progress_bar
from mot_megatron.checkpoint.streaming import Piece, WrittenFile, write_file, write_index_of
from mot_megatron.conversion.tensors import OutputTensor
from mot_megatron.errors import CheckpointError

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
) -> CheckpointInfo:
    """Write tensors, each produced when it is written, as the checkpoint of ``step``.

    Args:
        directory: Folder of checkpoints, created if missing; see ``check_free``.
        outputs: The tensors, in the order of the files.
        step: Number of optimizer steps completed.
        metadata: Everything else, serializable as JSON.
        config_text: The resolved configuration as TOML.
        file_bytes: Size at which a new tensor file is begun.

    Raises:
        CheckpointError: The directory has a checkpoint of that step, or the new one could not be
            written and is removed.
        UserError: A tensor cannot be produced; nothing is left behind.
    """
    by_name = {output.name: output for output in outputs}
    if len(by_name) != len(outputs):
        raise ValueError("two output tensors have the same name")
    pieces = [Piece.whole(o.name, o.info.shape, o.info.dtype) for o in outputs]

    def produce(piece: Piece) -> torch.Tensor:
        return by_name[piece.name].produce()

    def write(temporary: Path) -> list[WrittenFile]:
        total = sum(piece.num_bytes for piece in pieces)
        with progress_bar(f"writing {temporary.stem}", total) as progress:
            return [
                write_file(temporary / f"__0_{number}.distcp", part, produce, progress.update)
                for number, part in enumerate(_split(pieces, file_bytes))
            ]

    return commit(directory, step, write, metadata, config_text)


def commit(
    directory: Path,
    step: int,
    write: Callable[[Path], Sequence[WrittenFile]],
    metadata: Mapping[str, Any],
    config_text: str,
) -> CheckpointInfo:
    """Write tensor files into a temporary folder and commit it as the checkpoint of ``step``.

    Args:
        directory: Folder of checkpoints, created if missing.
        step: Number of optimizer steps completed.
        write: Writes the tensor files to the folder given to it.
        metadata: Everything else, serializable as JSON.
        config_text: The resolved configuration as TOML.

    Raises:
        CheckpointError: See ``write_checkpoint``.
    """
    save = UnfinishedSave(directory, step)
    check_free(directory, step)
    documents = documents_of(metadata, config_text)
    try:
        save.begin(save.final.name)
        try:
            files = write(save.temporary)
            write_index_of(save.temporary, files)
            names = {piece.name for file in files for piece in file.pieces}
            records = {file.name: file.record for file in files}
            return save.complete(names, records, documents)
        except BaseException:
            save.discard()
            raise
    except OSError as error:
        raise CheckpointError(
            f"cannot write checkpoint {save.final}: {describe_os_error(error)}"
        ) from error


def check_free(directory: Path, step: int) -> None:
    """Check that a folder of checkpoints has none of ``step``; a conversion never replaces one.

    Raises:
        CheckpointError: It has one, or it is no folder.
    """
    final = UnfinishedSave(directory, step).final
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory} is not a folder; give a folder of checkpoints")
    if final.exists():
        raise CheckpointError(f"{final} exists; give another folder, or move it away")


def _split(pieces: Sequence[Piece], file_bytes: int) -> Iterator[list[Piece]]:
    """Yield the pieces of each file: as many as fit, but at least one."""
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
