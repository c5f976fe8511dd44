"""In which order a blend draws documents from its sources.

Every source has a share of the tokens. After any number of documents with N tokens in all, a source
has contributed its share of N up to the length of one document. The rule is that of worst-case fair
weighted fair queueing (WF2Q, Bennett and Zhang, 1996), a packet being a document: among the sources
that are not ahead of their shares, draw from the one that would be level with its share first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm

import numpy as np


@dataclass(frozen=True)
class WindowSize:
    """When to stop drawing."""

    documents: int
    """Stop after so many documents..."""
    of_sources: tuple[int, ...]
    """... or when a source has given so many..."""
    least_tokens: int
    """... but not before there are so many tokens..."""
    most_documents: int
    """... except after so many documents."""


def draw(
    shares: Sequence[Fraction],
    lags: Sequence[Fraction],
    lengths: Sequence[Iterator[int]],
    size: WindowSize,
) -> tuple[np.ndarray, tuple[Fraction, ...]]:
    """Draw documents until a window is full.

    Args:
        shares: Share of each source, which sum to 1.
        lags: Tokens by which each source is behind its share, which sum to 0; negative if ahead.
        lengths: Tokens of each source's next documents, without an end.
        size: Size of the window.

    Returns:
        The source of each document, [documents] int64, and the lags after the last one.
    """
    whole = lcm(*(share.denominator for share in shares))
    parts = [int(share * whole) for share in shares]
    # In units of 1 / whole tokens, all numbers are integers, so every machine computes the same.
    behind = [int(lag * whole) for lag in lags]
    heads = [next(each) for each in lengths]
    left = list(size.of_sources)
    order: list[int] = []
    tokens, is_full = 0, False
    while len(order) < size.most_documents and not (is_full and tokens >= size.least_tokens):
        chosen = _next_source(parts, whole, behind, heads)
        length = heads[chosen]
        for source, part in enumerate(parts):
            behind[source] += part * length
        behind[chosen] -= whole * length
        tokens += length
        order.append(chosen)
        left[chosen] -= 1
        is_full = is_full or left[chosen] == 0 or len(order) == size.documents
        heads[chosen] = next(lengths[chosen])
    lags_after = tuple(Fraction(each, whole) for each in behind)
    return np.array(order, dtype=np.int64), lags_after


def _next_source(
    parts: Sequence[int], whole: int, behind: Sequence[int], heads: Sequence[int]
) -> int:
    chosen, best = -1, 0
    for source, lag in enumerate(behind):
        if lag < 0:
            continue
        # The source is level with its share after distance / part further tokens of all sources.
        distance = heads[source] * whole - lag
        if chosen < 0 or distance * parts[chosen] < best * parts[source]:
            chosen, best = source, distance
    return chosen
