"""A lock between processes of one machine, which the system releases when they end."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mot_megatron.errors import DataError


@contextmanager
def exclusive(path: Path, problem: str) -> Iterator[int]:
    """Hold the lock of a file, which is created if absent.

    Args:
        path: The file.
        problem: The error if another process holds the lock.

    Yields:
        The descriptor. A process that inherits it holds the lock as well, until it ends.

    Raises:
        DataError: Another process holds the lock.
        OSError: The file cannot be created.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(problem) from None
        yield file.fileno()
