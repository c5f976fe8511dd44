"""Atomic writes: a file is complete or absent, even if its writer is killed."""

from __future__ import annotations

from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write text (as UTF-8) or bytes to ``path``, replacing an existing file atomically.

    Raises:
        OSError: The file cannot be written.
    """
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
    unfinished.replace(path)
