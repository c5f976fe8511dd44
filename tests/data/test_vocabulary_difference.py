"""The first difference of two vocabularies is named, with both values."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from mot_megatron.data.vocabulary_difference import first_difference

ONE: dict[str, Any] = {
    "modalities": [
        {"name": "text", "first_id": 0, "size": 9, "codec": "bpe", "codebook": "aa"},
        {"name": "image", "first_id": 9, "size": 4, "codec": "none", "codebook": None},
    ],
    "special_tokens": {"<eos>": 1},
    "pad_token": 0,
}


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("modalities", 0, "codebook"), "bb", "the codebooks of modality text differ"),
        (("modalities", 1, "size"), 5, "size of modality image is 4 in A and 5 in B"),
        (("modalities", 1, "name"), "x", "name of modality image is 'image' in A and 'x' in B"),
        (("modalities", 1, "codebook"), "bb", "codebook of modality image is None in A and 'bb'"),
        (("special_tokens", "<eos>"), 2, "the id of special token <eos> is 1 in A and 2 in B"),
        (("special_tokens", "<bos>"), 2, "the id of special token <bos> is None in A and 2 in B"),
        (("pad_token",), 3, "pad_token is 0 in A and 3 in B"),
    ],
)
def test_first_difference(place: tuple[Any, ...], value: object, message: str) -> None:
    other = copy.deepcopy(ONE)
    inside: Any = other
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = value
    assert first_difference(ONE, other, ("A", "B")).startswith(message)


def test_fewer_modalities() -> None:
    other = {**ONE, "modalities": ONE["modalities"][:1]}
    found = first_difference(ONE, other, ("A", "B"))
    assert found == "the number of modalities is 2 in A and 1 in B"


def test_size_is_named_before_what_follows_from_it() -> None:
    other = copy.deepcopy(ONE)
    other["modalities"][0] |= {"size": 10, "codebook": "bb", "first_id": 1}
    found = first_difference(ONE, other, ("A", "B"))
    assert found == "size of modality text is 9 in A and 10 in B"
