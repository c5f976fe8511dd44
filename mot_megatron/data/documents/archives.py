"""WebDataset tar archives: neighboring members with the same stem are one document."""

from __future__ import annotations

import json
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from mot_megatron.data.documents.raw import (
    LARGEST_FILE_BYTES,
    BrokenItemError,
    FindMedia,
    Media,
    RawDocument,
    parse_document,
    quoted,
)
from mot_megatron.errors import DataError

KEY_OF_SUFFIX = {
    "txt": "text",
    "png": "image",
    "jpg": "image",
    "jpeg": "image",
    "webp": "image",
    "wav": "audio",
    "flac": "audio",
    "ogg": "audio",
    "mp3": "audio",
}
"""Kind of the members with each suffix. ``json`` describes the whole document; others are
ignored."""


def read_archive(path: Path, split_key: str | None) -> Iterator[RawDocument]:
    """Yield the documents of a tar archive, in one pass.

    Members with the suffixes of ``KEY_OF_SUFFIX`` are the segments of a document in their order.
    If the document has a ``.json`` member, its object is merged: ``segments``, whose media are
    names or suffixes of members, replace that order, ``text`` and ``language`` are added.

    Raises:
        DataError: The archive is damaged, or a document has no ``split_key``.
    """
    stem, members = "", dict[str, bytes]()
    for name, content in _members(path):
        its_stem = _stem(name)
        if its_stem != stem and members:
            yield _document(path, stem, members, split_key)
            members = {}
        stem = its_stem
        members[PurePosixPath(name).name] = content
    if members:
        yield _document(path, stem, members, split_key)


def _stem(name: str) -> str:
    path = PurePosixPath(name)
    return str(path.with_name(path.name.partition(".")[0] or path.name))


def _suffix(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with tarfile.open(path, "r|*") as archive:
            for member in archive:
                known = _suffix(member.name) in {*KEY_OF_SUFFIX, "json"}
                if not member.isfile() or not known:
                    continue
                if member.size > LARGEST_FILE_BYTES:
                    raise DataError(
                        f"{path}: member {member.name} has {member.size} bytes, expected at most "
                        f"{LARGEST_FILE_BYTES}"
                    )
                stream = archive.extractfile(member)
                assert stream is not None
                yield member.name, stream.read()
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a readable tar archive: {error}") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None


def _document(
    path: Path, stem: str, members: Mapping[str, bytes], split_key: str | None
) -> RawDocument:
    where = f"{path}:{quoted(stem)}"
    try:
        value = _description(members)
    except BrokenItemError as error:
        return RawDocument(where, problem=str(error))
    return parse_document(value, where, _among(members), split_key)


def _description(members: Mapping[str, bytes]) -> dict[str, object]:
    described: dict[str, object] = {}
    segments: list[dict[str, object]] = []
    for name, content in members.items():
        key = KEY_OF_SUFFIX.get(_suffix(name))
        if key is None:
            described = _json(name, content)
        elif key == "text":
            try:
                segments.append({key: content.decode()})
            except UnicodeDecodeError as error:
                raise BrokenItemError(f"{quoted(name)}: not UTF-8 at byte {error.start}") from None
        else:
            segments.append({key: name})
    if isinstance(described.get("text"), str) and not any("text" in each for each in segments):
        segments.insert(0, {"text": described["text"]})
    return {"segments": segments} | described


def _json(name: str, content: bytes) -> dict[str, object]:
    try:
        value = json.loads(content.decode())
    except (ValueError, RecursionError) as error:  # a Unicode error is a ValueError
        raise BrokenItemError(f"{quoted(name)}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise BrokenItemError(f"{quoted(name)}: {quoted(value)}, expected an object")
    return value


def _among(members: Mapping[str, bytes]) -> FindMedia:
    by_suffix = {_suffix(name): name for name in members}

    def find(value: object, where: str) -> Media:
        name = by_suffix.get(value, value) if isinstance(value, str) else None
        if name is None or name not in members:
            raise BrokenItemError(f"{quoted(value)} is no member of {where}")
        return Media(quoted(name), members[name])

    return find
