"""Splits and random generators derived from keys.

A concept's name determines its split, and a document's key and the seed determine its random
numbers. A document therefore does not depend on which other documents are built, on their order,
or on the number of workers.
"""

from __future__ import annotations

import hashlib

import numpy as np

HELD_OUT_PERCENT = 6
"""Percentage of the concepts in the validation split."""


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")


def is_held_out(concept: str) -> bool:
    """Return whether ``concept`` is in the validation split, independent of the seed."""
    return _digest(f"concept/{concept}") % 10_000 < HELD_OUT_PERCENT * 100


def split_of(concept: str) -> str:
    """Return the name of the split that contains ``concept``."""
    return "validation" if is_held_out(concept) else "train"


def generator(seed: int, *key: str) -> np.random.Generator:
    """Return a random generator that depends only on ``seed`` and ``key``."""
    return np.random.default_rng(_digest("/".join((str(seed), *key))))


def is_in_share(key: str, share: float) -> bool:
    """Return whether ``key`` is one of the ``share`` of all keys that are held out."""
    return _digest(f"document/{key}") < share * 2.0**128
