"""Sources whose documents are lines, of JSON or of text, or whole text files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from mot_megatron.data.documents.raw import (
    BrokenItemError,
    FindMedia,
    Media,
    RawDocument,
    parse_document,
)
from mot_megatron.errors import DataError

LONGEST_LINE_BYTES = 1 << 28
_SHARD_BYTES = 1 << 26
"""A shard ends after this many bytes, however few lines it has."""


class Span(NamedTuple):
    """A range of whole lines of a file."""

    path: Path
    start: int
    end: int
    first: int
    """Number of the first line, counted from 1."""


def cut_lines(path: Path, most_lines: int) -> Iterator[tuple[int, int, int]]:
    """Yield start, end (bytes) and number of the first line of the shards of a file.

    Raises:
        DataError: The file cannot be read, or a line is too long.
    """
    start = end = count = 0
    first, size = 1, path.stat().st_size
    with tqdm(total=size, desc="listing", unit="B", unit_scale=True, delay=5, ncols=100) as bar:
        for line in _lines(Span(path, 0, size, 1)):
            end += len(line)
            count += 1
            if count == most_lines or end - start >= _SHARD_BYTES:
                yield start, end, first
                bar.update(end - start)
                start, first, count = end, first + count, 0
    if end > start:
        yield start, end, first


def _lines(span: Span) -> Iterator[bytes]:
    try:
        with span.path.open("rb") as stream:
            stream.seek(span.start)
            number = span.first
            while stream.tell() < span.end and (line := stream.readline(LONGEST_LINE_BYTES + 1)):
                if len(line) > LONGEST_LINE_BYTES:
                    raise DataError(
                        f"{span.path}: line {number} is longer than {LONGEST_LINE_BYTES} bytes"
                    )
                yield line
                number += 1
    except OSError as error:
        raise DataError(f"{span.path}: {error.strerror}") from None


def read_json(span: Span, find: FindMedia, split_key: str | None) -> Iterator[RawDocument]:
    """Yield the document of each line of JSON; blank lines are skipped."""
    for number, line in enumerate(_lines(span), start=span.first):
        where = f"{span.path}:{number}"
        # RFC 8259 allows ignoring a byte order mark.
        content = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if not content.strip():
            continue
        try:
            value = json.loads(content.decode())
        except UnicodeDecodeError as error:
            yield RawDocument(where, problem=f"not UTF-8 at byte {error.start} of the line")
        except json.JSONDecodeError as error:
            yield RawDocument(where, problem=f"not JSON: {error.msg} at character {error.pos}")
        except (ValueError, RecursionError) as error:
            yield RawDocument(where, problem=f"not JSON: {error}")
        else:
            yield parse_document(value, where, find, split_key)


def read_text(span: Span, split_key: str | None) -> Iterator[RawDocument]:
    """Yield a document per line of text; blank lines are skipped."""
    for number, line in enumerate(_lines(span), start=span.first):
        content = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if content.strip():
            yield _text(content.rstrip(b"\r\n"), f"{span.path}:{number}", split_key)


def read_files(paths: Sequence[Path], split_key: str | None) -> Iterator[RawDocument]:
    """Yield a document per text file."""
    for path in paths:
        try:
            content = Media(str(path), path=path).read()
        except BrokenItemError as error:
            yield RawDocument(str(path), problem=str(error))
        else:
            yield _text(content, str(path), split_key)


def _text(content: bytes, where: str, split_key: str | None) -> RawDocument:
    try:
        value = {"text": content.decode()}
    except UnicodeDecodeError as error:
        return RawDocument(where, problem=f"not UTF-8 at byte {error.start}")
    return parse_document(value, where, _no_media, split_key)


def _no_media(value: object, where: str) -> Media:
    raise AssertionError(f"{where}: text has no media, but {value!r}")
