"""The order in which a blend draws documents keeps every source within a document of its share."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import chain, cycle, islice

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mot_megatron.data.interleaving import WindowSize, draw

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=8)
SOURCES = st.lists(st.tuples(st.integers(1, 20), LENGTHS), min_size=1, max_size=12)


def shares_of(weights: list[int]) -> list[Fraction]:
    return [Fraction(weight, sum(weights)) for weight in weights]


def window(count: int) -> WindowSize:
    """Return a window of ``count`` documents."""
    return WindowSize(count, (count, count) * 6, 0, count)


def drawn(shares: list[Fraction], lengths: list[list[int]], count: int) -> list[int]:
    size = window(count)
    zero = [Fraction(0)] * len(shares)
    return draw(shares, zero, [cycle(each) for each in lengths], size)[0].tolist()


def plain_order(shares: list[Fraction], lengths: list[list[int]], count: int) -> list[int]:
    """Do the same in the words of the paper: eligible documents by their finishing times."""
    upcoming: list[Iterator[int]] = [cycle(each) for each in lengths]
    heads = [next(each) for each in upcoming]
    contributed = [0] * len(shares)
    order = []
    for _ in range(count):
        total = sum(contributed)
        finish = {
            source: (contributed[source] + heads[source]) / share
            for source, share in enumerate(shares)
            if contributed[source] <= share * total
        }
        chosen = min(finish, key=lambda source: (finish[source], source))
        order.append(chosen)
        contributed[chosen] += heads[chosen]
        heads[chosen] = next(upcoming[chosen])
    return order


@given(SOURCES)
def test_every_source_stays_within_a_document_of_its_share(
    sources: list[tuple[int, list[int]]],
) -> None:
    shares = shares_of([weight for weight, _ in sources])
    lengths = [each for _, each in sources]
    order = drawn(shares, lengths, 200)
    assert order == plain_order(shares, lengths, 200)
    longest = max(map(max, lengths))
    upcoming = [cycle(each) for each in lengths]
    contributed = [0] * len(shares)
    for source in order:
        contributed[source] += next(upcoming[source])
        for share, tokens in zip(shares, contributed, strict=True):
            assert abs(share * sum(contributed) - tokens) <= longest


def test_shares_are_those_of_tokens() -> None:
    # Documents of 10 and 30 tokens in equal shares: three of the first for one of the second.
    assert drawn(shares_of([1, 1]), [[10], [30]], 8) == [0, 1, 0, 0, 0, 1, 0, 0]


@given(SOURCES, st.integers(1, 60))
def test_lags_continue_the_order(sources: list[tuple[int, list[int]]], first: int) -> None:
    shares = shares_of([weight for weight, _ in sources])
    lengths = [each for _, each in sources]
    whole = drawn(shares, lengths, 100)
    zero = [Fraction(0)] * len(shares)
    begun, lags = draw(shares, zero, [cycle(each) for each in lengths], window(first))
    assert sum(lags) == 0
    counts = np.bincount(begun, minlength=len(shares)).tolist()
    rest = [islice(cycle(each), count, None) for each, count in zip(lengths, counts, strict=True)]
    more, _ = draw(shares, lags, rest, window(100 - first))
    assert [*begun.tolist(), *more.tolist()] == whole


def test_window_ends_when_it_has_enough() -> None:
    def count(size: WindowSize) -> int:
        lengths = [cycle([10]), cycle([10])]
        return len(draw(shares_of([3, 1]), [Fraction(0)] * 2, lengths, size)[0])

    assert count(WindowSize(7, (99, 99), 0, 100)) == 7
    assert count(WindowSize(7, (99, 99), 201, 100)) == 21
    assert count(WindowSize(7, (99, 99), 10_000, 100)) == 100
    # One source gives three quarters of the documents: 30 of 40.
    assert 39 <= count(WindowSize(90, (30, 99), 0, 100)) <= 40
    assert count(WindowSize(90, (30, 99), 505, 100)) == 51


def test_carried_documents_come_first() -> None:
    lengths = [chain([5, 5], cycle([10])), cycle([10])]
    order = draw(shares_of([1, 1]), [Fraction(0)] * 2, lengths, window(6))[0]
    # 5 and 5 tokens of the first source are level with 10 of the second.
    assert order.tolist() == [0, 1, 0, 0, 1, 0]
