"""Atomic writes, and reads that neither block nor exhaust the memory."""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path

LONGEST_TEXT_BYTES = 1 << 24
"""Limit for configuration files and other descriptions, far above any that a person would write."""


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write text (as UTF-8) or bytes to ``path``, replacing an existing file atomically.

    The file is complete or absent, even if its writer is killed or the machine loses power.

    Raises:
        OSError: The file cannot be written.
    """
    unfinished = path.with_name(path.name + ".tmp")
    with unfinished.open("wb") as stream:
        stream.write(content.encode() if isinstance(content, str) else content)
        stream.flush()
        os.fsync(stream.fileno())
    unfinished.replace(path)


def read_regular_file(path: Path, at_most: int = LONGEST_TEXT_BYTES) -> bytes:
    """Read a regular file of at most ``at_most`` bytes.

    A named pipe would block forever and a device might never end.

    Raises:
        OSError: The file cannot be read, is not a regular file or is too long.
    """
    size = regular_file_size(path)
    if size > at_most:
        raise OSError(errno.EFBIG, f"it has {size} bytes; allowed: at most {at_most}", str(path))
    return path.read_bytes()


def regular_file_size(path: Path) -> int:
    """Return the size of a regular file in bytes.

    Raises:
        OSError: There is no such file, or it is not a regular file.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return status.st_size


def expand_path(path: str | Path) -> Path:
    """Return a path that a user wrote, with a leading ``~`` expanded as a shell does.

    Raises:
        ValueError: The user is unknown, or the path contains a variable such as ``$SCRATCH``, which
            only a shell expands; a folder of that name would be created instead.
    """
    if re.search(r"\$(\w|\{)", str(path)):
        raise ValueError("variables are not expanded in paths; write the value")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(str(error)) from error
