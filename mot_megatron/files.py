"""Files that are there whole or not at all, whenever their writer is killed."""

from __future__ import annotations

from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Write text, as UTF-8, or bytes; what was there before stays until the new is on the disk.

    Raises:
        OSError: it cannot be written.
    """
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
    unfinished.replace(path)
