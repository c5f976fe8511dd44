"""What a document's key decides: its split, and its own random numbers.

Everything hangs on the key alone, so a document is the same whichever others are built beside it,
in whatever order and by however many workers.
"""

from __future__ import annotations

import hashlib

import numpy as np

HELD_OUT_PERCENT = 6
"""Percent of the concepts that go to validation."""


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")


def is_held_out(concept: str) -> bool:
    """Whether all documents about ``concept`` belong to validation; no seed changes it."""
    return _digest(f"concept/{concept}") % 10_000 < HELD_OUT_PERCENT * 100


def split_of(concept: str) -> str:
    """Name of the split that ``concept`` belongs to."""
    return "validation" if is_held_out(concept) else "train"


def generator(seed: int, *key: str) -> np.random.Generator:
    """A random generator of its own for ``key``."""
    return np.random.default_rng(_digest("/".join((str(seed), *key))))
