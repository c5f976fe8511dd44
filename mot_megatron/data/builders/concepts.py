"""What belongs together belongs to one split: things that share any content are one concept.

Sources repeat themselves under several names (a flag drawn for two countries, one recording for
two stamps); a split by name would validate on what training has seen.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_REMARK = re.compile(r"\([^)]*\)")
_WORD = re.compile(r"[^\W\d_]+")
_ARTICLES = {"a", "an", "the", "some"}


def name_words(name: str) -> str:
    """What an English name names: its words without articles, numbers and remarks in brackets.

    ``The dogs (2)`` and ``dogs 3`` are the same, ``a dog`` is not.
    """
    words = _WORD.findall(_REMARK.sub(" ", name.lower()))
    return " ".join(word for word in words if word not in _ARTICLES) or name.lower()


def join_concepts(marks: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """Name of each thing -> its concept, the least name among all it is connected with.

    Args:
        marks: Name -> what identifies its contents, such as captions and digests. Two things with
            a mark in common are connected; so are things connected with a third.
    """
    parent = {name: name for name in marks}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    first_with: dict[str, str] = {}
    for name, its_marks in marks.items():
        for mark in its_marks:
            low, high = sorted((root(name), root(first_with.setdefault(mark, name))))
            parent[high] = low
    return {name: root(name) for name in marks}
