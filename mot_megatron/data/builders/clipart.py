"""Clip art: drawings with titles and keywords, from the Debian package openclipart-svg.

Many titles name the collection that a drawing came from rather than what it shows. Such a title
usually occurs in many files or contains a word such as "collection"; these drawings are skipped.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import unescape

import numpy as np

from mot_megatron.data.builders.deb import read_deb
from mot_megatron.data.builders.pictures import render_svg
from mot_megatron.errors import DataError

LICENCES = {"openclipart-svg": "public domain"}
_FOLDER = "usr/share/openclipart/svg/"
_TITLE = re.compile(r"<dc:title[^>]*>([^<]*)</dc:title>")
_KEYWORD = re.compile(r"<rdf:li[^>]*>\s*([^<]+?)\s*</rdf:li>")
_PUBLIC_DOMAIN = re.compile(r"license[^>]*resource=\"[^\"]*public ?domain", re.IGNORECASE)
_AUTHOR = re.compile(r"^clipart by [^-]+ - ", re.IGNORECASE)
_COLLECTION = re.compile(r"\b(collection|clip ?arts?|theme|iconset|submission)\b", re.IGNORECASE)
_LETTERS = re.compile(r"[^\W\d_]{3}")
_FILES_PER_TITLE, _FILES_PER_SIGNED_TITLE = 15, 2
"""Maximum number of files with the same title; a title of more files is taken to name a collection.
The limit is lower for titles that begin with the author's name, because these often do."""
_LONGEST_TITLE = 60
_NO_KEYWORD = {"hash", "unsorted", "special"}
_NEVER_MIRRORED = {"flag", "sign", "symbol", "arrow", "map", "letter", "led", "text", "roadsign"}


@dataclass(frozen=True)
class ClipArt:
    """A drawing with its title and keywords."""

    name: str
    """File name, relative to the package's folder of drawings."""
    title: str
    keywords: tuple[str, ...]

    @property
    def may_mirror(self) -> bool:
        """Whether the mirrored drawing shows the same thing (it has no writing or direction)."""
        return _NEVER_MIRRORED.isdisjoint(self.keywords)


def read_package(path: Path) -> dict[str, bytes]:
    """Return the package's drawings by name, relative to its folder of drawings.

    Raises:
        DataError: The file is missing, damaged, or a different package.
    """
    files = read_deb(path, lambda name: name.startswith(_FOLDER) and name.endswith(".svg"))
    if not files:
        raise DataError(f"{path}: has no {_FOLDER}, expected package openclipart-svg")
    return {name.removeprefix(_FOLDER): content for name, content in files.items()}


def list_clip_art(files: Mapping[str, bytes]) -> list[ClipArt]:
    """List the public-domain drawings whose titles describe what they show, sorted by name."""
    texts = {name: files[name].decode("utf-8", "replace") for name in sorted(files)}
    titles = {name: _title(text) for name, text in texts.items()}
    repeated = Counter(titles.values())
    return [
        ClipArt(name, _AUTHOR.sub("", titles[name]), _keywords(text))
        for name, text in texts.items()
        if _PUBLIC_DOMAIN.search(text) and not _is_junk(titles[name], repeated[titles[name]])
    ]


def _title(text: str) -> str:
    match = _TITLE.search(text)
    return " ".join(unescape(match[1]).replace("_", " ").split()) if match else ""


def _is_junk(title: str, files: int) -> bool:
    shown = _AUTHOR.sub("", title)
    most = _FILES_PER_TITLE if shown == title else _FILES_PER_SIGNED_TITLE
    too_long, wordless = len(shown) > _LONGEST_TITLE, not _LETTERS.search(shown)
    return files > most or too_long or wordless or bool(_COLLECTION.search(shown))


def _keywords(text: str) -> tuple[str, ...]:
    found = dict.fromkeys(unescape(word).replace("_", " ") for word in _KEYWORD.findall(text))
    return tuple(word for word in found if word not in _NO_KEYWORD and _LETTERS.search(word))


def draw_clip_art(tasks: list[tuple[str, bytes]]) -> list[np.ndarray | None]:
    """Render the masters of drawings, given as (name, content); None if one cannot be rendered.

    The package contains a few empty or broken files, which should not fail the whole build.
    """
    masters: list[np.ndarray | None] = []
    for name, content in tasks:
        try:
            masters.append(render_svg(content.decode("utf-8", "replace"), name))
        except DataError:
            masters.append(None)
    return masters
