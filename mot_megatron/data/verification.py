"""Which corpora this machine has verified, so that not every rank of every job reads all tokens.

A stamp in the machine's temporary folder lists the files of a corpus with their sizes, inodes and
times. While nothing of that changes, the content counts as verified. Stamps are lost when the
machine starts anew, which costs one verification.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from mot_megatron.files import write_atomically

_SETTLED_SECONDS = 2.0
"""Files that changed more recently get no stamp: another change might not show in their times."""


@contextlib.contextmanager
def verified_once(directory: Path, names: Sequence[str]) -> Iterator[bool]:
    """Yield whether files must be verified; after the block, they are known to have been.

    The processes of one user on this machine take turns, so that the first one verifies and the
    others find its stamp. If the block raises an error, there is no stamp, and the next process
    verifies. Without a private folder for stamps, every process verifies.

    Args:
        directory: Folder of a corpus.
        names: Its files, all of which exist.

    Raises:
        OSError: A file does not exist.
    """
    before = _state(directory, names)
    with _turn(directory) as stamp:
        if stamp is None:
            yield True
            return
        if _read(stamp) == before:
            yield False
            return
        yield True
        newest = max(max(of_file[-2:]) for of_file in before.values())
        is_settled = time.time_ns() - newest > _SETTLED_SECONDS * 1e9
        if is_settled and _state(directory, names) == before:
            with contextlib.suppress(OSError):  # a full disk costs a verification, not the job
                write_atomically(stamp, json.dumps(before))


def _state(directory: Path, names: Sequence[str]) -> dict[str, list[int]]:
    """Return size, device, inode and the times of change of every file."""
    state = {}
    for name in names:
        found = (directory / name).stat()
        times = [found.st_mtime_ns, found.st_ctime_ns]
        state[name] = [found.st_size, found.st_dev, found.st_ino, *times]
    return state


def _read(stamp: Path) -> object:
    try:
        return json.loads(stamp.read_bytes())
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def _turn(directory: Path) -> Iterator[Path | None]:
    """Wait for the other processes that look at a corpus; yield its stamp, or None without one."""
    folder = Path(tempfile.gettempdir()) / f"mot_megatron-{os.getuid()}"
    name = hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:32]
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        # Nobody else may write stamps.
        if found.st_uid != os.getuid() or found.st_mode & 0o077 or not folder.is_dir():
            raise PermissionError(folder)
        lock = (folder / f"{name}.lock").open("w")
    except OSError:
        yield None
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder / f"{name}.json"
