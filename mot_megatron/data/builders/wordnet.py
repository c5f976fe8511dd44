"""WordNet's glosses: what a word means, in a sentence, from the Debian package wordnet-base."""

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
"""File -> part of speech of what it lists."""
_SYNTAX = re.compile(r"\((?:a|p|ip)\)$")
"""Where an adjective may stand, written behind it."""
_MOST_WORDS = 3
_LONGEST = 160
"""Characters of a definition with its examples."""


@dataclass(frozen=True)
class Gloss:
    """One meaning."""

    name: str
    """Unique: part of speech and place in the file."""
    words: tuple[str, ...]
    """The words that have this meaning, the usual one first; at most three."""
    part: str
    definition: str
    examples: tuple[str, ...]
    """As many as keep the gloss short, in quotation marks."""

    @property
    def text(self) -> str:
        """All of it in one line."""
        meaning = "; ".join((self.definition, *self.examples))
        return f"{', '.join(self.words)} ({self.part}): {meaning}"

    @property
    def sentence(self) -> str:
        """What is said of it aloud: the word and its definition."""
        return f"{self.words[0]}: {self.definition}"


def read_package(path: Path) -> dict[str, bytes]:
    """The package's four lists of meanings.

    Raises:
        DataError: The file is missing, damaged, or another package.
    """
    wanted = {_FOLDER + name for name in _PARTS}
    files = read_deb(path, wanted.__contains__)
    if files.keys() != wanted:
        raise DataError(f"{path}: lacks {_FOLDER}data.*, expected package wordnet-base")
    return {name.removeprefix(_FOLDER): content for name, content in files.items()}


def list_glosses(files: Mapping[str, bytes]) -> list[Gloss]:
    """All meanings whose definition is not too long, in the order of the files."""
    # The licence stands at the head of each file, indented.
    glosses = (
        _parse(line, part)
        for name, part in _PARTS.items()
        for line in files[name].decode("utf-8", "replace").splitlines()
        if line[:1].isdigit()
    )
    return [gloss for gloss in glosses if len(gloss.definition) <= _LONGEST]


def _parse(line: str, part: str) -> Gloss:
    """Line: ``offset file type count(hex) word id word id ... | definition; "example"; ...``."""
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
