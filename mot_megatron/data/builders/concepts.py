"""Concepts: items that share any content form one concept, which is kept within one split.

Sources repeat content under several names (the same flag for two countries, one recording for two
stamps). Splitting by name would therefore put training content into the validation split.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_REMARK = re.compile(r"\([^)]*\)")
_WORD = re.compile(r"[^\W\d_]+")
_ARTICLES = {"a", "an", "the", "some"}


def name_words(name: str) -> str:
    """Normalize an English name: drop articles, numbers and remarks in parentheses.

    ``The dogs (2)`` and ``dogs 3`` give the same result; ``a dog`` does not.
    """
    words = _WORD.findall(_REMARK.sub(" ", name.lower()))
    return " ".join(word for word in words if word not in _ARTICLES) or name.lower()


def join_concepts(marks: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """Map the name of each item to its concept.

    Items that share a mark are connected, directly or through other items. The concept of a
    connected set is its alphabetically first name.

    Args:
        marks: Name -> marks that identify the item's content, such as captions and digests.
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
