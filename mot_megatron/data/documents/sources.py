"""Find the source files, cut them into shards, and read the documents of a shard.

A shard is the unit of work and of resumption: a range of lines, some text files, a tar archive, or
a row group of a table. Shards depend on the files alone, not on the number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mot_megatron.data.documents import archives, lines, tables
from mot_megatron.data.documents.decode import Fit
from mot_megatron.data.documents.raw import RawDocument, media_below
from mot_megatron.errors import DataError
from mot_megatron.files import regular_file_size

FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "text",
    ".tar": "tar",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
"""Format of the files with each suffix."""
_CACHE_PREFIX = "cache-"
"""Start of the names of the temporary results in a folder of Hugging Face datasets."""
_FILES_PER_SHARD = 256


@dataclass(frozen=True)
class SourceFile:
    """A source file, as it was when the work began."""

    path: Path
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> SourceFile:
        """Look at ``path``.

        Raises:
            DataError: There is no such regular file.
        """
        try:
            return cls(path, regular_file_size(path), path.stat().st_mtime_ns)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from None


@dataclass(frozen=True)
class Shard:
    """Documents that are encoded together."""

    format: str
    files: tuple[SourceFile, ...]
    """One file, except of text files that are a document each."""
    start: int = 0
    """First byte of the first line, or number of the row group."""
    end: int = 0
    """First byte after the last line, for lines."""
    first: int = 1
    """Number of the first line or row in its file, counted from 1."""


@dataclass(frozen=True)
class Reading:
    """How sources are read."""

    root: Path | None = None
    """Folder to which the paths of media are relative; None: the folder of the file with them."""
    split_key: str | None = None
    text_documents: Literal["line", "file"] = "line"
    shard_documents: int = 4096
    """Largest number of lines in a shard."""
    fit: Fit = "crop"
    """How a picture becomes a square."""


def list_shards(inputs: Sequence[Path], reading: Reading) -> list[Shard]:
    """Return the shards of all inputs in their order; folders are searched for source files.

    Raises:
        DataError: An input is missing or of an unknown format, a folder has no or several kinds of
            source files, a file is given twice, or a package that the format needs is missing.
    """
    shards: list[Shard] = []
    texts: list[SourceFile] = []
    paths = [each for given in inputs for each in _files_of(given)]
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise DataError(f"{path}: given twice, expected each file once")
        seen.add(path.resolve())
        source = SourceFile.of(path)
        kind = FORMATS[path.suffix.lower()]
        if kind == "text" and reading.text_documents == "file":
            texts.append(source)
        elif kind in ("jsonl", "text"):
            shards += [
                Shard(kind, (source,), *cut)
                for cut in lines.cut_lines(path, reading.shard_documents)
            ]
        elif kind == "parquet":
            shards += [
                Shard(kind, (source,), group, first=first)
                for group, first in enumerate(tables.row_groups(path))
            ]
        else:
            shards.append(Shard(kind, (source,)))
    shards += [
        Shard("files", tuple(texts[start : start + _FILES_PER_SHARD]))
        for start in range(0, len(texts), _FILES_PER_SHARD)
    ]
    if not shards:
        raise DataError(f"{', '.join(map(str, inputs))}: no documents, expected at least one")
    return shards


def _files_of(given: Path) -> list[Path]:
    if not given.is_dir():
        if given.suffix.lower() not in FORMATS:
            raise DataError(f"{given}: expected a folder or a file {', '.join(FORMATS)}")
        return [given]
    found = [
        path
        for path in sorted(given.rglob("*"))
        if path.suffix.lower() in FORMATS
        and path.is_file()
        and not path.name.startswith(_CACHE_PREFIX)
    ]
    kinds = sorted({FORMATS[path.suffix.lower()] for path in found})
    if len(kinds) != 1:
        what = f"sources of several kinds ({', '.join(kinds)})" if kinds else "no source"
        raise DataError(
            f"{given}: the folder has {what}, expected files of one kind, "
            f"{', '.join(FORMATS)}; name the files themselves"
        )
    return found


def read_shard(shard: Shard, reading: Reading) -> Iterator[RawDocument]:
    """Yield the documents of a shard in order.

    Raises:
        DataError: A file has changed since it was listed, is damaged as a whole, or a document
            asks for a file outside of the allowed folder.
    """
    for source in shard.files:
        if SourceFile.of(source.path) != source:
            raise DataError(f"{source.path}: changed while it was read; start again")
    source, *_ = shard.files
    find = media_below(reading.root or source.path.parent)
    if shard.format == "files":
        yield from lines.read_files([each.path for each in shard.files], reading.split_key)
    elif shard.format == "text":
        span = lines.Span(source.path, shard.start, shard.end, shard.first)
        yield from lines.read_text(span, reading.split_key)
    elif shard.format == "jsonl":
        span = lines.Span(source.path, shard.start, shard.end, shard.first)
        yield from lines.read_json(span, find, reading.split_key)
    elif shard.format == "tar":
        yield from archives.read_archive(source.path, reading.split_key)
    elif shard.format == "parquet":
        rows = tables.parquet_rows(source.path, shard.start)
        yield from tables.read_rows(source.path, rows, shard.first, find, reading.split_key)
    else:
        rows = tables.arrow_rows(source.path)
        yield from tables.read_rows(source.path, rows, shard.first, find, reading.split_key)
