"""Read files of Debian packages without installing them.

A .deb is an ar archive that contains a tar archive of the package's files.
"""

from __future__ import annotations

import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from mot_megatron.errors import DataError

_MAGIC = b"!<arch>\n"
_HEADER_BYTES = 60
_COMPRESSIONS = {".xz": "xz", ".gz": "gz", ".bz2": "bz2", "": ""}


def read_deb(path: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """Read files of a package into memory.

    Args:
        path: The .deb file.
        wanted: Predicate on the file name that selects files. Names have no leading ``./``.

    Returns:
        Name -> content.

    Raises:
        DataError: The file is missing, not a .deb, truncated, or uses an unsupported compression.
    """
    try:
        with path.open("rb") as stream:
            suffix, size = _find_data(stream, path)
            with tqdm(total=size, desc="unpacking", unit="B", unit_scale=True, ncols=100) as bar:
                return _read_tar(_Member(stream, size, bar), suffix, wanted)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise DataError(f"{path}: damaged or truncated: {error}") from None


def _find_data(stream: BinaryIO, path: Path) -> tuple[str, int]:
    """Seek ``stream`` to the data tar; return its compression suffix and its size in bytes."""
    if stream.read(len(_MAGIC)) != _MAGIC:
        raise DataError(f"{path}: not a .deb (an ar archive begins with '!<arch>')")
    while len(header := stream.read(_HEADER_BYTES)) == _HEADER_BYTES:
        name, size = header[:16].decode("ascii", "replace").strip(" /"), header[48:58].strip()
        if not size.isdigit():
            raise DataError(f"{path}: damaged: member {name!r} has size {size!r}")
        if name.startswith("data.tar"):
            suffix = name.removeprefix("data.tar")
            if suffix not in _COMPRESSIONS:
                raise DataError(
                    f"{path}: {name} has an unsupported compression, expected one of "
                    f"{['data.tar' + known for known in _COMPRESSIONS]}"
                )
            return suffix, int(size)
        stream.seek(int(size) + int(size) % 2, 1)  # members start at even offsets
    raise DataError(f"{path}: no data.tar inside, not a .deb or truncated")


def _read_tar(member: _Member, suffix: str, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    files = {}
    with tarfile.open(fileobj=member, mode=f"r|{_COMPRESSIONS[suffix]}") as tar:  # type: ignore[call-overload]
        for entry in tar:
            name = entry.name.removeprefix("./")
            content = tar.extractfile(entry) if entry.isfile() and wanted(name) else None
            if content is not None:
                files[name] = content.read()
    return files


class _Member:
    """A file-like view of the next ``size`` bytes of a stream, with a progress bar."""

    def __init__(self, stream: BinaryIO, size: int, bar: tqdm) -> None:
        self._stream, self._left, self._bar = stream, size, bar

    def read(self, size: int) -> bytes:
        """Read at most ``size`` bytes.

        Raises:
            EOFError: The stream ends before the member does.
        """
        expected = min(size, self._left)
        content = self._stream.read(expected)
        if len(content) < expected:
            raise EOFError(f"ends {self._left - len(content)} bytes early")
        self._left -= len(content)
        self._bar.update(len(content))
        return content
