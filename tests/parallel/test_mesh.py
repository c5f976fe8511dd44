"""The mesh's arithmetic against the groups that megatron makes for 256 ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from mot_megatron.parallel.groups import build_process_groups, build_single_process_groups
from mot_megatron.parallel.mesh import Mesh


@pytest.fixture
def no_world() -> Iterator[None]:
    """Without process groups before and after the test, whatever ran before it."""
    _leave_world()
    yield
    _leave_world()


def _leave_world() -> None:
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.usefixtures("no_world")
@pytest.mark.parametrize(("rank", "tensor"), [(0, 1), (37, 2), (100, 8), (255, 8), (255, 256)])
def test_groups_of_256_ranks_are_megatrons(rank: int, tensor: int) -> None:
    # The fake backend lets one process stand for any rank of a large world.
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=256)
    groups = build_process_groups(tensor, torch.device("cpu"))
    mesh = Mesh(256, tensor)
    tensor_ranks = dist.get_process_group_ranks(groups.tensor)
    data_ranks = dist.get_process_group_ranks(groups.data)
    assert tensor_ranks in mesh.tensor_groups()
    assert data_ranks in mesh.data_groups()
    assert tensor_ranks[groups.tensor_rank] == rank
    assert data_ranks[groups.data_rank] == rank
    assert (groups.tensor_size, groups.data_size) == (tensor, 256 // tensor)
    assert parallel_state.get_tensor_model_parallel_rank() == groups.tensor_rank
    assert parallel_state.get_data_parallel_rank() == groups.data_rank


@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
def test_every_rank_is_in_one_group_of_each_axis(tensor: int) -> None:
    mesh = Mesh(8, tensor)
    for groups, size in ((mesh.tensor_groups(), tensor), (mesh.data_groups(), 8 // tensor)):
        assert sorted(rank for group in groups for rank in group) == list(range(8))
        assert {len(group) for group in groups} == {size}


def test_tensor_parallel_ranks_are_neighbours() -> None:
    mesh = Mesh(8, 2)
    assert mesh.tensor_groups() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert mesh.data_groups() == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert [(mesh.tensor_rank(r), mesh.data_rank(r)) for r in (0, 3, 6)] == [(0, 0), (1, 1), (0, 3)]


@pytest.mark.usefixtures("no_world")
def test_a_world_of_one_can_be_made_again() -> None:
    for _ in range(2):
        groups = build_single_process_groups(torch.device("cpu"))
        assert (groups.tensor_size, groups.data_size, groups.rank) == (1, 1, 0)
