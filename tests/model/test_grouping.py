"""Moving rows between sequence order and grouped order."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from mot_megatron.model.grouping import Grouping, rank_major


def grouping_of(towers: list[int], num_towers: int, multiple: int) -> Grouping:
    """Group tokens with these tower indices; slots are rounded up to ``multiple``."""
    of_tokens = torch.tensor(towers, dtype=torch.int64)
    indices = tuple(torch.nonzero(of_tokens == k).flatten() for k in range(num_towers))
    return Grouping(indices, tuple(-(-len(index) // multiple) * multiple for index in indices))


assignments = st.lists(st.integers(0, 2), min_size=1, max_size=30)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(assignments, st.integers(1, 3))
def test_grouping_and_ungrouping_is_the_identity(towers: list[int], multiple: int) -> None:
    grouping = grouping_of(towers, 3, multiple)
    rows = torch.randn(len(towers), 2, 3)
    slices = grouping.to_towers(rows)
    assert [len(part) for part in slices] == list(grouping.slots)
    assert torch.equal(grouping.to_sequence(slices), rows)
    for part, index in zip(slices, grouping.indices, strict=True):
        assert torch.equal(part[: len(index)], rows[index])
        assert not part[len(index) :].any()


@pytest.mark.parametrize("multiple", [1, 2])
@pytest.mark.parametrize(
    ("towers", "num_towers"), [([0, 1, 1, 0, 2, 1], 3), ([1, 1, 1], 3), ([0, 0, 0], 1)]
)
def test_gradients_equal_finite_differences(
    towers: list[int], num_towers: int, multiple: int
) -> None:
    grouping = grouping_of(towers, num_towers, multiple)
    rows = torch.randn(len(towers), 2, dtype=torch.float64, requires_grad=True)
    slices = [
        torch.randn(slots, 2, dtype=torch.float64, requires_grad=True) for slots in grouping.slots
    ]
    assert torch.autograd.gradcheck(grouping.to_towers, (rows,))
    assert torch.autograd.gradcheck(lambda *parts: grouping.to_sequence(parts), slices)


def test_gradient_of_padding_is_zero() -> None:
    grouping = grouping_of([0, 1, 0, 0], 2, 4)
    slices = [torch.randn(4, 2, requires_grad=True) for _ in range(2)]
    # The incoming gradient is not contiguous.
    grouping.to_sequence(slices).backward(torch.ones(2, 4).T)
    assert [part.grad.sum(dim=1).tolist() for part in slices if part.grad is not None] == [
        [2, 2, 2, 0],
        [2, 0, 0, 0],
    ]


def test_rank_major_equals_a_gather_of_local_streams() -> None:
    slots = (4, 0, 6)
    values = torch.arange(10)
    # Rank 0 holds slots 0, 1 of tower 0 and 4, 5, 6 of tower 2; rank 1 the rest.
    assert rank_major(values, slots, 2).tolist() == [0, 1, 4, 5, 6, 2, 3, 7, 8, 9]
    assert rank_major(values, slots, 1) is values


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(st.lists(st.integers(0, 3), min_size=1, max_size=4), st.integers(1, 4))
def test_rank_major_splits_every_tower_evenly(parts: list[int], num_ranks: int) -> None:
    hypothesis.assume(any(parts))
    slots = tuple(part * num_ranks for part in parts)
    values = torch.arange(sum(slots))
    of_ranks = rank_major(values, slots, num_ranks).chunk(num_ranks)
    for tower, part in enumerate(values.split(slots)):
        held = [rank.split(parts)[tower] for rank in of_ranks]
        assert torch.equal(torch.cat(held), part)
