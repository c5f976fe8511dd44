"""WordNet glosses, one-sentence definitions of words, from the Debian package wordnet-base."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mot_megatron.data.builders.deb import read_deb
from mot_megatron.errors import DataError

LICENCES = {"wordnet-base": "WordNet-3.0"}
_FOLDER = "usr/share/wordnet/"
_PARTS = {
    "data.noun": "noun",
    "data.verb": "verb",
    "data.adj": "adjective",
    "data.adv": "adverb",
}
"""File name -> part of speech of the words it lists."""
_SYNTAX = re.compile(r"\((?:a|p|ip)\)$")
"""Suffix of an adjective that gives the syntactic positions in which it may occur."""
_MOST_WORDS = 3
_LONGEST = 160
"""Maximum characters of a definition with its examples."""


@dataclass(frozen=True)
class Gloss:
    """A meaning, with the words that have it."""

    name: str
    """Unique name: part of speech and offset in the file."""
    words: tuple[str, ...]
    """At most three words that have this meaning, the most common first."""
    part: str
    """Part of speech."""
    definition: str
    examples: tuple[str, ...]
    """Usage examples in quotation marks, as many as fit the maximum length."""

    @property
    def text(self) -> str:
        """Words, part of speech, definition and examples in one line."""
        meaning = "; ".join((self.definition, *self.examples))
        return f"{', '.join(self.words)} ({self.part}): {meaning}"

    @property
    def sentence(self) -> str:
        """The sentence to speak: the first word and the definition."""
        return f"{self.words[0]}: {self.definition}"


def read_package(path: Path) -> dict[str, bytes]:
    """Return the package's four data files by name.

    Raises:
        DataError: The file is missing, damaged, or a different package.
    """
    wanted = {_FOLDER + name for name in _PARTS}
    files = read_deb(path, wanted.__contains__)
    if files.keys() != wanted:
        raise DataError(f"{path}: lacks {_FOLDER}data.*, expected package wordnet-base")
    return {name.removeprefix(_FOLDER): content for name, content in files.items()}


def list_glosses(files: Mapping[str, bytes]) -> list[Gloss]:
    """List the meanings whose definitions are not too long, in the order of the files."""
    # Each file starts with the license, whose lines are indented.
    glosses = (
        _parse(line, part)
        for name, part in _PARTS.items()
        for line in files[name].decode("utf-8", "replace").splitlines()
        if line[:1].isdigit()
    )
    return [gloss for gloss in glosses if len(gloss.definition) <= _LONGEST]


def _parse(line: str, part: str) -> Gloss:
    """Parse a line ``offset file type count(hex) word id word id ... | definition; "example"``."""
    fields, _, meaning = line.partition(" | ")
    offset, _, _, count, *rest = fields.split()
    words = dict.fromkeys(
        _SYNTAX.sub("", word).replace("_", " ") for word in rest[0 : 2 * int(count, 16) : 2]
    )
    definition, *examples = meaning.strip().split('; "')
    room, kept = _LONGEST - len(definition), []
    for example in examples:
        room -= len(example) + 3
        if room < 0:
            break
        kept.append('"' + example)
    first = tuple(words)[:_MOST_WORDS]
    return Gloss(f"{part}/{offset}", first, part, definition, tuple(kept))
