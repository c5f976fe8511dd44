"""Sets of positions as sorted intervals, [n, 2] int64 of first position and end, and as masks."""

from __future__ import annotations

import numpy as np

NONE = np.empty((0, 2), dtype=np.int64)
"""No positions."""
NONE.flags.writeable = False


def intervals_of(mask: np.ndarray, start: int = 0) -> np.ndarray:
    """Return the intervals of the positions that are set in ``mask``.

    Args:
        mask: [m] bool.
        start: Position of its first element.
    """
    edges = np.diff(np.concatenate(([False], mask, [False])).astype(np.int8))
    return start + np.stack((np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)), axis=1)


def mask_of(intervals: np.ndarray, start: int, end: int) -> np.ndarray:
    """Return which of the positions ``start`` to ``end`` are in ``intervals``, [end - start] bool.

    Takes time for the intervals in this range only, besides two binary searches.
    """
    first = np.searchsorted(intervals[:, 1], start, side="right")
    last = np.searchsorted(intervals[:, 0], end, side="left")
    mask = np.zeros(end - start, dtype=bool)
    for begin, stop in intervals[first:last].tolist():
        mask[max(begin - start, 0) : stop - start] = True
    return mask
