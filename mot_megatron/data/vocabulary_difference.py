"""Where two vocabularies differ, for error messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def first_difference(
    one: Mapping[str, Any], other: Mapping[str, Any], names: tuple[str, str]
) -> str:
    """Say in which modality, codebook or special token two vocabularies differ first.

    Args:
        one: As ``Corpus.vocabulary``.
        other: Another one.
        names: What the two are called.
    """
    pairs = zip(one["modalities"], other["modalities"], strict=False)
    for ours, theirs in pairs:
        for key in sorted({**ours, **theirs}, key=_order):
            values = ours.get(key), theirs.get(key)
            if values[0] == values[1]:
                continue
            if key == "codebook" and all(values):
                return f"the codebooks of modality {ours['name']} differ"
            return _differ(f"{key} of modality {ours['name']}", values, names)
    counts = len(one["modalities"]), len(other["modalities"])
    if counts[0] != counts[1]:
        return _differ("the number of modalities", counts, names)
    special = one["special_tokens"], other["special_tokens"]
    for name in sorted({**special[0], **special[1]}):
        values = special[0].get(name), special[1].get(name)
        if values[0] != values[1]:
            return _differ(f"the id of special token {name}", values, names)
    return _differ("pad_token", (one["pad_token"], other["pad_token"]), names)


def _order(key: str) -> tuple[bool, bool, str]:
    """Name and size tell more than what follows from them."""
    return key != "name", key != "size", key


def _differ(what: str, values: tuple[object, object], names: tuple[str, str]) -> str:
    return f"{what} is {values[0]!r} in {names[0]} and {values[1]!r} in {names[1]}"
