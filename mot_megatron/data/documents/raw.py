"""A raw document: its segments as they stand in a source, before anything is decoded.

A source describes a document as a JSON value: a list of segments, an object with the key
``segments``, or an object whose keys ``text``, ``image`` and ``audio`` are its segments in their
order. A segment is an object with one of these three keys and perhaps ``language`` and ``loss``,
which is false for a segment that is context only.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mot_megatron.data.structure import IMAGE, KINDS, SPEECH, TEXT, language_token, special_tokens
from mot_megatron.errors import DataError
from mot_megatron.files import read_regular_file

KIND_OF_KEY = {"text": TEXT, "image": IMAGE, "audio": SPEECH}
"""Modality of the segments with each key."""
LANGUAGE_KEY = "language"
LOSS_KEY = "loss"
SEGMENTS_KEY = "segments"
LARGEST_FILE_BYTES = 1 << 30
"""Largest picture, sound or text file that is read; each is held in memory."""
_LANGUAGE = re.compile(r"[A-Za-z0-9_-]{1,40}")
_LONGEST_QUOTE = 200
_STRUCTURE = frozenset(special_tokens(KINDS, ()))


class BrokenItemError(Exception):
    """A document cannot be used: it is counted, listed and left out."""


def quoted(value: object) -> str:
    """Return a value of a source for messages, on one line and not too long."""
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= _LONGEST_QUOTE else text[:_LONGEST_QUOTE] + "..."


def is_language(name: str) -> bool:
    """Return whether ``name`` can have a token, such as ``<en>``, that means nothing else."""
    return bool(_LANGUAGE.fullmatch(name)) and language_token(name) not in _STRUCTURE


@dataclass(frozen=True)
class Media:
    """An encoded picture or sound, in memory or in a file."""

    name: str
    """Name for messages."""
    content: bytes | None = None
    path: Path | None = None
    """File with the content if ``content`` is None."""

    def read(self) -> bytes:
        """Return the content.

        Raises:
            BrokenItemError: The file is missing, unreadable, too large or no regular file.
        """
        if self.content is not None:
            return self.content
        assert self.path is not None
        try:
            return read_regular_file(self.path, LARGEST_FILE_BYTES)
        except OSError as error:
            raise BrokenItemError(f"{self.name}: {error.strerror}") from None


@dataclass(frozen=True)
class RawSegment:
    """A segment: text, or an encoded picture or sound."""

    kind: str
    """Name of the modality."""
    content: str | Media
    """Text for the modality of text, otherwise media."""
    language: str | None = None
    context: bool = False
    """Whether it is context only: nothing is trained to predict it."""


@dataclass(frozen=True)
class RawDocument:
    """A document as a source describes it."""

    where: str
    """File and line, row or member, for messages."""
    segments: tuple[RawSegment, ...] = ()
    key: str | None = None
    """Value that chooses the split; None: the content does."""
    problem: str | None = None
    """Why the document cannot be used, if the source itself is broken here."""


FindMedia = Callable[[object, str], Media]
"""Maps the value of a media segment and the name of the document to the media."""


def media_below(root: Path) -> FindMedia:
    """Return a function that finds media by their path, relative to ``root`` and within it.

    The function raises DataError for a path outside of ``root``, because a list of documents from
    elsewhere must not read any file of the user, and BrokenItemError for a value of another type.
    """
    allowed = root.resolve()

    def find(value: object, where: str) -> Media:
        if isinstance(value, Mapping):  # the form of pictures and sounds in Hugging Face datasets
            content = value.get("bytes")
            if isinstance(content, bytes):
                return Media(quoted(value.get("path") or "embedded bytes"), content)
            value = value.get("path")
        if isinstance(value, bytes):
            return Media("embedded bytes", value)
        if not isinstance(value, str) or not value:
            raise BrokenItemError(f"{quoted(value)} is not the path of a file")
        try:
            path = (allowed / value).resolve()
        # A null byte, half a surrogate pair, or links in a circle.
        except (OSError, ValueError, RuntimeError) as error:
            raise BrokenItemError(f"{value!r} is not the path of a file: {error}") from None
        if not path.is_relative_to(allowed):
            raise DataError(
                f"{where}: {value!r} lies outside of {root}; files are read only below the folder "
                "of the list, or below --root DIR (--root / allows all)"
            )
        return Media(quoted(value), path=path)

    return find


def parse_document(
    value: object, where: str, find: FindMedia, split_key: str | None = None
) -> RawDocument:
    """Build a document from its description; see the module's docstring.

    Args:
        value: The description. Other keys of an object that is a whole document are ignored.
        where: Name for messages.
        find: Finds the media of a segment.
        split_key: Key of a document whose value chooses the split.

    Returns:
        The document; if its description is wrong, a document with a ``problem``.

    Raises:
        DataError: A file outside of the allowed folder, or ``split_key`` is absent.
    """
    key = None
    if split_key is not None:
        if not isinstance(value, Mapping) or value.get(split_key) is None:
            raise DataError(f"{where}: no key {split_key!r}, which --split-key names")
        key = json.dumps(value[split_key], sort_keys=True, default=str)
    try:
        return RawDocument(where, tuple(_segments(value, where, find)), key)
    except BrokenItemError as error:
        return RawDocument(where, problem=str(error))


def _segments(value: object, where: str, find: FindMedia) -> Iterator[RawSegment]:
    language = None
    items: Sequence[Any]
    if isinstance(value, Mapping):
        language = value.get(LANGUAGE_KEY)
        items = value.get(SEGMENTS_KEY) or [
            {key: value[key]} for key in value if key in KIND_OF_KEY and value[key] is not None
        ]
    else:
        items = value if isinstance(value, list) else []
    if not isinstance(items, list) or not items:
        raise BrokenItemError(
            f"no segments, expected a list of objects with one of the keys {', '.join(KIND_OF_KEY)}"
        )
    for number, item in enumerate(items, start=1):
        yield _segment(item, f"segment {number}", language, where, find)


def _segment(item: object, name: str, language: object, where: str, find: FindMedia) -> RawSegment:
    # Tables hold every column of every row; columns of other kinds are null there.
    given = (
        {key: each for key, each in item.items() if each is not None}
        if isinstance(item, Mapping)
        else {}
    )
    kinds = [key for key in given if key in KIND_OF_KEY]
    if len(kinds) != 1 or given.keys() - {*KIND_OF_KEY, LANGUAGE_KEY, LOSS_KEY}:
        raise BrokenItemError(
            f"{name} has the keys {quoted(list(given))}, expected one of "
            f"{', '.join(KIND_OF_KEY)} and perhaps {LANGUAGE_KEY} and {LOSS_KEY}"
        )
    is_trained = given.get(LOSS_KEY, True)
    if not isinstance(is_trained, bool):
        raise BrokenItemError(f"{name}: loss {quoted(is_trained)}, expected true or false")
    value = given[kinds[0]]
    language = given.get(LANGUAGE_KEY, language)
    if language is not None and not (isinstance(language, str) and is_language(language)):
        raise BrokenItemError(
            f"{name}: language {quoted(language)}, expected letters, digits, - and _, such as en-GB"
        )
    kind = KIND_OF_KEY[kinds[0]]
    if kind != TEXT:
        return RawSegment(kind, find(value, where), context=not is_trained)
    if not isinstance(value, str):
        raise BrokenItemError(f"{name}: text {quoted(value)}, expected a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BrokenItemError(f"{name}: text is not UTF-8 at position {error.start}") from None
    return RawSegment(kind, value, language, not is_trained)


def content_digest(segments: Sequence[tuple[str, str | bytes]]) -> str:
    """Return the SHA-256 of a document's content, given as modality and content."""
    digest = hashlib.sha256()
    for kind, content in segments:
        data = content.encode() if isinstance(content, str) else content
        digest.update(f"{kind} {len(data)} ".encode())
        digest.update(data)
    return digest.hexdigest()
