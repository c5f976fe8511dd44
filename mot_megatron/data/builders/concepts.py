"""What belongs together belongs to one split: things that share any content are one concept.

Sources repeat themselves under several names (a flag drawn for two countries, one recording for
two stamps); a split by name would validate on what training has seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping


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
