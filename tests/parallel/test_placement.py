"""Tests that placements have the fewest copies, are balanced, and split tokens by their shares."""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mot_megatron.parallel.placement import Placement, balanced_placement

tower_flops = st.lists(
    st.one_of(st.just(0.0), st.floats(1e-3, 1e3)), min_size=1, max_size=4
)  # a tower has zero FLOPs if the corpus lacks its modalities


def least_maximum(flops: list[float], num_ranks: int) -> float:
    """Return the lowest maximum load over all placements with the fewest copies, by exhaustion."""
    towers = range(len(flops))
    if num_ranks < len(flops):  # every tower on one rank, every rank with a tower
        assignments = itertools.product(range(num_ranks), repeat=len(flops))
        return min(
            max(sum(flops[tower] for tower in towers if ranks[tower] == r) for r in set(ranks))
            for ranks in assignments
            if len(set(ranks)) == num_ranks
        )
    # Every rank has one tower, whose holders share its tokens equally: only their number matters.
    counts = itertools.product(range(1, num_ranks + 1), repeat=len(flops))
    return min(
        max(flop / count for flop, count in zip(flops, holders, strict=True))
        for holders in counts
        if sum(holders) == num_ranks
    )


@settings(deadline=None)
@given(tower_flops, st.integers(1, 8))
def test_fewest_copies_then_lowest_maximum_load(flops: list[float], num_ranks: int) -> None:
    placement = balanced_placement(flops, num_ranks)
    assert (placement.num_ranks, placement.num_towers) == (num_ranks, len(flops))
    assert placement.num_copies == max(len(flops), num_ranks)
    assert max(placement.loads(flops)) == pytest.approx(least_maximum(flops, num_ranks))
    assert sum(placement.loads(flops)) == pytest.approx(sum(flops))
    assert all(placement.towers(rank) for rank in range(num_ranks))
    for tower in range(len(flops)):
        shares = [row[tower] for row in placement.shares]
        assert sum(shares) == pytest.approx(1)
        assert {share for share in shares if share > 0} == {1 / len(placement.holders(tower))}


def test_holders_and_towers_are_consistent() -> None:
    placement = Placement(((0.3, 1.0, 0.0), (0.7, 0.0, 0.5), (0.0, 0.0, 0.5)))
    assert [placement.towers(rank) for rank in range(3)] == [(0, 1), (0, 2), (2,)]
    assert [placement.holders(tower) for tower in range(3)] == [(0, 1), (0,), (1, 2)]
    assert placement.num_copies == 5
    # 0.3 * 10 + 20, 0.7 * 10 + 0.5 * 4, 0.5 * 4
    assert placement.loads([10, 20, 4]) == pytest.approx((23, 9, 2))


@pytest.mark.parametrize(
    ("flops", "num_ranks", "holders"),
    [
        ([4.0, 2.0, 1.0], 2, [(0,), (1,), (1,)]),
        # 4/2, 2, 1: the fourth rank goes to the largest tower.
        ([4.0, 2.0, 1.0], 4, [(0, 1), (2,), (3,)]),
        # With seven ranks, loads are equal: 4/4, 2/2, 1/1. The eighth goes to the first of them.
        ([4.0, 2.0, 1.0], 8, [(0, 1, 2, 3, 4), (5, 6), (7,)]),
        ([1.0, 3.0], 2, [(0,), (1,)]),
        ([1.0, 3.0], 3, [(0,), (1, 2)]),
        ([1.0, 3.0], 4, [(0,), (1, 2, 3)]),
        ([1.0], 2, [(0, 1)]),
        ([0.0, 1.0], 4, [(0,), (1, 2, 3)]),
        ([0.0, 0.0, 0.0], 2, [(0,), (0,), (1,)]),
    ],
)
def test_placements_computed_by_hand(
    flops: list[float], num_ranks: int, holders: list[tuple[int, ...]]
) -> None:
    placement = balanced_placement(flops, num_ranks)
    found = [placement.holders(tower) for tower in range(len(flops))]
    if sum(flops) == 0:  # it does not matter which tower has a rank to itself
        assert sorted(map(len, found)) == sorted(map(len, holders))
    else:
        assert found == holders


def test_eight_towers_are_placed_within_a_second() -> None:
    flops = [1 / (1 + tower) for tower in range(8)]
    begin = time.process_time()
    for num_ranks in range(1, 9):
        balanced_placement(flops, num_ranks)
    assert time.process_time() - begin < 1


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    """Draw any shares: a tower may have several holders, a rank several towers or none."""
    num_ranks, num_towers = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    columns = []
    for _ in range(num_towers):
        weights = draw(st.lists(st.integers(0, 5), min_size=num_ranks, max_size=num_ranks))
        weights = weights if any(weights) else [1] * num_ranks
        columns.append([weight / sum(weights) for weight in weights])
    return Placement(tuple(zip(*columns, strict=True)))


@settings(deadline=None)
@given(placements(), st.integers(0, 10_000))
def test_cuts_give_holders_their_share(placement: Placement, num_tokens: int) -> None:
    for tower in range(placement.num_towers):
        cuts = placement.cuts(tower, num_tokens)
        assert len(cuts) == placement.num_ranks + 1
        assert (cuts[0], cuts[-1]) == (0, num_tokens)
        for rank in range(placement.num_ranks):
            taken = cuts[rank + 1] - cuts[rank]
            share = placement.shares[rank][tower]
            assert taken >= 0
            assert abs(taken - num_tokens * share) <= 1 + 1e-6
            if rank not in placement.holders(tower):
                assert taken == 0


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 7, 1000])
@pytest.mark.parametrize("third", [0.333, 1 / 3, 0.3334])
def test_rounded_shares_lose_no_token(third: float, num_tokens: int) -> None:
    # Three user-written thirds may not sum to one, and the last rank does not hold the tower.
    placement = Placement(((third, 0.0), (third, 0.0), (third, 0.5), (0.0, 0.5)))
    cuts = placement.cuts(0, num_tokens)
    assert cuts[0] == 0
    assert cuts[3:] == (num_tokens, num_tokens)
    assert list(cuts) == sorted(cuts)
