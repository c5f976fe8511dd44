"""Tests of the mesh's rank arithmetic, and of its groups against megatron's for 256 ranks."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from mot_megatron.parallel.groups import (
    ProcessGroups,
    build_process_groups,
    build_single_process_groups,
)
from mot_megatron.parallel.mesh import Mesh
from mot_megatron.parallel.placement import Placement, balanced_placement
from mot_megatron.parallel.timeouts import COLLECTIVE_TIMEOUT
from tests.fake_world import leave_world
from tests.ranks import run_ranks

SPLIT = Placement(((1.0, 0.25, 0.0), (0.0, 0.75, 0.0), (0.0, 0.0, 0.5), (0.0, 0.0, 0.5)))


@pytest.fixture
def no_world() -> Iterator[None]:
    """Destroy all process groups before and after the test."""
    leave_world()
    yield
    leave_world()


def groups_of_256(
    rank: int, tensor: int, pipeline: int, placement: Placement | None
) -> ProcessGroups:
    # With the fake backend, one process can be any rank of a large world.
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=256)
    return build_process_groups(
        tensor,
        torch.device("cpu"),
        pipeline_model_parallel_size=pipeline,
        placement=placement,
    )


def members(group: dist.ProcessGroup | None) -> list[int]:
    assert group is not None
    return dist.get_process_group_ranks(group)


LARGE = pytest.mark.parametrize(
    ("rank", "tensor", "pipeline", "placement"),
    [
        (0, 1, 1, None),
        (37, 2, 1, None),
        (255, 8, 1, None),
        (255, 256, 1, None),
        (100, 8, 4, None),
        (37, 2, 16, None),
        (200, 1, 2, SPLIT),
        (77, 2, 4, SPLIT),
        (255, 8, 8, SPLIT),
        (130, 4, 2, balanced_placement([3.0, 1.0], 2)),
        (131, 4, 2, balanced_placement([1.0], 2)),  # a dense model: both ranks hold its tower
    ],
)


@pytest.mark.usefixtures("no_world")
@LARGE
def test_groups_of_256_ranks_equal_those_of_megatron(
    rank: int, tensor: int, pipeline: int, placement: Placement | None
) -> None:
    groups = groups_of_256(rank, tensor, pipeline, placement)
    mesh = groups.mesh
    for group, all_groups, position, size, megatrons in (
        (
            groups.tensor,
            mesh.tensor_groups(),
            groups.tensor_rank,
            groups.tensor_size,
            parallel_state.get_tensor_model_parallel_rank(),
        ),
        (
            groups.data,
            mesh.data_groups(),
            groups.data_rank,
            groups.data_size,
            parallel_state.get_data_parallel_rank(),
        ),
        (
            groups.pipeline,
            mesh.pipeline_groups(),
            groups.pipeline_rank,
            groups.pipeline_size,
            parallel_state.get_pipeline_model_parallel_rank(),
        ),
    ):
        assert members(group) in all_groups
        assert members(group)[position] == rank
        assert len(members(group)) == size
        assert position == megatrons
    assert (groups.tensor_size, groups.pipeline_size) == (tensor, pipeline)
    assert groups.data_size == 256 // (tensor * pipeline)
    stages = members(groups.pipeline)
    assert set(members(groups.model)) == {  # every tensor-parallel neighbor of every stage
        other for group in mesh.tensor_groups() if set(group) & set(stages) for other in group
    }


@pytest.mark.usefixtures("no_world")
@LARGE
def test_towers_of_256_ranks_reduce_over_their_holders(
    rank: int, tensor: int, pipeline: int, placement: Placement | None
) -> None:
    groups = groups_of_256(rank, tensor, pipeline, placement)
    assert groups.reduction_group(-1) is groups.data
    if placement is None:
        assert (groups.modality, groups.holders, groups.modality_size) == (None, (), 1)
        assert groups.towers_held(3) == (0, 1, 2)
        assert groups.reduction_group(2) is groups.data
        return
    neighbors = members(groups.modality)
    assert neighbors in groups.mesh.modality_groups()
    assert neighbors[groups.modality_rank] == rank
    assert groups.modality_size == placement.num_ranks
    held = groups.towers_held(placement.num_towers)
    assert held == placement.towers(groups.modality_rank)
    for tower in range(placement.num_towers):
        if tower in held:
            assert members(groups.reduction_group(tower)) == [
                other
                for other in members(groups.data)
                if groups.mesh.modality_rank(other) in placement.holders(tower)
            ]
        else:
            assert groups.holders[tower] is None


@pytest.mark.usefixtures("no_world")
@pytest.mark.parametrize(
    ("rank", "stages_with_embedding"), [(3, [3, 195]), (195, [3, 195]), (67, None)]
)
def test_first_and_last_stage_share_the_embedding(
    rank: int, stages_with_embedding: list[int] | None
) -> None:
    # Four stages of 64 ranks: 3, 67, 131, 195 form a pipeline.
    groups = groups_of_256(rank, 2, 4, None)
    found = None if groups.embedding is None else members(groups.embedding)
    assert found == stages_with_embedding


@st.composite
def meshes(draw: st.DrawFn) -> Mesh:
    tensor, modality, copies, pipeline = (draw(st.integers(1, 4)) for _ in range(4))
    return Mesh(tensor * modality * copies * pipeline, tensor, pipeline, modality)


@settings(deadline=None)
@given(meshes())
def test_coordinates_determine_the_rank(mesh: Mesh) -> None:
    for rank in range(mesh.world_size):
        tensor, data = mesh.tensor_rank(rank), mesh.data_rank(rank)
        pipeline, modality = mesh.pipeline_rank(rank), mesh.modality_rank(rank)
        assert (pipeline * mesh.data + data) * mesh.tensor + tensor == rank
        assert modality == data % mesh.modality
        assert tensor < mesh.tensor
        assert data < mesh.data
        assert pipeline < mesh.pipeline


@settings(deadline=None)
@given(meshes())
def test_ranks_of_a_group_differ_in_one_coordinate_only(mesh: Mesh) -> None:
    tensor, data, pipeline = mesh.tensor_rank, mesh.data_rank, mesh.pipeline_rank
    ranks = range(mesh.world_size)
    for groups, own, others, size in (
        (mesh.tensor_groups(), tensor, lambda r: (data(r), pipeline(r)), mesh.tensor),
        (mesh.data_groups(), data, lambda r: (tensor(r), pipeline(r)), mesh.data),
        (mesh.pipeline_groups(), pipeline, lambda r: (tensor(r), data(r)), mesh.pipeline),
        (
            mesh.modality_groups(),
            mesh.modality_rank,
            lambda r: (tensor(r), data(r) // mesh.modality, pipeline(r)),
            mesh.modality,
        ),
    ):
        assert sorted(rank for group in groups for rank in group) == list(ranks)
        assert len({others(group[0]) for group in groups}) == len(groups)
        for group in groups:
            assert len({others(rank) for rank in group}) == 1
            assert [own(rank) for rank in group] == list(range(size))


@settings(deadline=None)
@given(meshes(), st.data())
def test_holder_groups_are_parts_of_data_groups(mesh: Mesh, data: st.DataObject) -> None:
    chosen = data.draw(st.sets(st.integers(0, mesh.modality - 1), min_size=1))
    groups = mesh.holder_groups(chosen)
    wanted = [rank for rank in range(mesh.world_size) if mesh.modality_rank(rank) in chosen]
    assert sorted(rank for group in groups for rank in group) == wanted
    for group, whole in zip(groups, mesh.data_groups(), strict=True):
        assert set(group) <= set(whole)
        assert group == sorted(group)


@settings(deadline=None)
@given(meshes(), st.data())
def test_expert_groups_partition_the_holders(mesh: Mesh, data: st.DataObject) -> None:
    chosen = data.draw(st.sets(st.integers(0, mesh.modality - 1), min_size=1))
    holders = mesh.holder_groups(chosen)
    divisors = [size for size in range(1, 17) if len(holders[0]) % size == 0]
    size = data.draw(st.sampled_from(divisors))
    groups = mesh.expert_groups(chosen, size)
    same_experts = mesh.expert_data_groups(chosen, size)
    everyone = sorted(rank for group in holders for rank in group)
    for of_all in (groups, same_experts, mesh.tensor_expert_groups(chosen, size)):
        assert sorted(rank for group in of_all for rank in group) == everyone
    assert all(len(group) == size for group in groups)
    # A rank's experts depend on its position in its expert group.
    place = {rank: group.index(rank) for group in groups for rank in group}
    for group in same_experts:
        assert len({place[rank] for rank in group}) == 1
        assert any(set(group) <= set(whole) for whole in holders)
        assert len(group) == len(holders[0]) // size
    for group in mesh.tensor_expert_groups(chosen, size):
        assert [mesh.tensor_rank(rank) for rank in group] == list(range(mesh.tensor)) * size
        for first in range(mesh.tensor):
            assert group[first :: mesh.tensor] in groups


def test_ranks_that_communicate_most_are_neighbors() -> None:
    mesh = Mesh(16, tensor=2, pipeline=2, modality=2)
    assert mesh.tensor_groups()[:4] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert mesh.modality_groups()[:4] == [[0, 2], [4, 6], [1, 3], [5, 7]]
    assert mesh.data_groups()[:2] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert mesh.pipeline_groups()[:2] == [[0, 8], [1, 9]]
    assert mesh.holder_groups([1])[0] == [2, 6]
    assert mesh.expert_groups([0, 1], 2)[:3] == [[0, 2], [4, 6], [1, 3]]
    assert mesh.expert_data_groups([0, 1], 2)[:3] == [[0, 4], [2, 6], [1, 5]]
    assert mesh.tensor_expert_groups([0, 1], 2)[:2] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert mesh.expert_groups([1], 2)[0] == [2, 6]


def timeouts_of_groups(wanted: timedelta | None) -> dict[str, timedelta]:
    build = partial(build_process_groups, timeout=wanted) if wanted else build_process_groups
    # Only one rank holds the second tower, so that it has a separate group.
    placement = Placement(((1.0, 1.0), (1.0, 0.0)))
    groups = build(1, torch.device("cpu"), placement=placement)
    named: dict[str, dist.ProcessGroup | None] = {
        name: getattr(groups, name) for name in ("tensor", "data", "model", "pipeline", "modality")
    }
    named |= {f"holders of {tower}": group for tower, group in enumerate(groups.holders)}
    found = {}
    for name, group in named.items():
        if group is not None:
            found[name] = group._get_backend(torch.device("cpu")).options._timeout
    return found


@pytest.mark.parametrize("wanted", [None, timedelta(minutes=3)])
def test_collectives_of_every_group_have_the_timeout(wanted: timedelta | None) -> None:
    first, second = run_ranks(timeouts_of_groups, 2, wanted)
    assert set(first) - set(second) == {"holders of 1"}
    assert len(first) == 7
    assert set(first.values()) | set(second.values()) == {wanted or COLLECTIVE_TIMEOUT}


@pytest.mark.usefixtures("no_world")
def test_single_process_groups_can_be_built_twice() -> None:
    for _ in range(2):
        groups = build_single_process_groups(torch.device("cpu"))
        assert (groups.tensor_size, groups.data_size, groups.rank) == (1, 1, 0)
