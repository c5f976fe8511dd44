"""A new folder of files for another program: written under a temporary name, then renamed."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from mot_megatron.checkpoint.agreement import describe_os_error
from mot_megatron.checkpoint.find import UNFINISHED_SUFFIX
from mot_megatron.checkpoint.manifest import sync_directory
from mot_megatron.conversion.write import check_space
from mot_megatron.errors import CheckpointError


def check_new(directory: Path, num_bytes: int) -> None:
    """Check that a folder can be written: it does not exist, and there is space.

    Raises:
        CheckpointError: It exists, or its file system has too little space.
    """
    if directory.exists():
        raise CheckpointError(f"{directory} exists; give a new folder, or move it away")
    check_space(directory, num_bytes)


@contextlib.contextmanager
def new_folder(directory: Path, is_own: Callable[[str], bool]) -> Iterator[Path]:
    """Yield a temporary folder, which becomes ``directory`` at the end; after an error it is gone.

    Args:
        directory: The folder, which does not exist.
        is_own: Tells by a file's name whether an unfinished export may have left it.

    Raises:
        CheckpointError: A file cannot be written, or what is in the way is no unfinished export.
    """
    temporary = directory.with_name(directory.name + UNFINISHED_SUFFIX)
    try:
        _clear(temporary, is_own)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            sync_directory(temporary)
            temporary.rename(directory)
            sync_directory(directory.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    except OSError as error:
        raise CheckpointError(f"cannot write {directory}: {describe_os_error(error)}") from error


def _clear(temporary: Path, is_own: Callable[[str], bool]) -> None:
    """Delete what an export that was killed has left.

    Raises:
        CheckpointError: The folder contains something else.
    """
    if not temporary.exists():
        return
    for path in temporary.iterdir():
        if path.is_dir() or not is_own(path.name):
            raise CheckpointError(
                f"{temporary} exists, and {path.name} in it is not of an unfinished export; move it"
                " away"
            )
    shutil.rmtree(temporary)
