"""Tests of layouts of 256 to 1024 ranks: process groups, and which ranks hold which parameters."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from mot_megatron.config import Config
from mot_megatron.model.flops import count_parameters
from mot_megatron.model.inventory import HeldParameter
from mot_megatron.model.sharding import SHARED
from mot_megatron.parallel.groups import build_process_groups
from mot_megatron.parallel.mesh import Mesh
from mot_megatron.parallel.placement import Placement, balanced_placement
from mot_megatron.planning.memory import held_by_rank, mesh_of
from mot_megatron.rules import check_world_size
from tests.fake_world import fake_world
from tests.model.small_models import small_config

TOWER_FLOPS = (5.0, 3.0, 1.0)
BIG_ENOUGH = [
    "model.num_layers=8",
    "model.hidden_size=64",
    "model.num_attention_heads=8",
    "model.ffn_hidden_size=64",
    "model.untied.qk_norm=false",
    "training.global_batch_size=1536",
]


@dataclass(frozen=True)
class Layout:
    """World size, sizes of the parallel axes, and number of towers."""

    world_size: int
    tensor: int
    pipeline: int
    modality: int
    towers: int
    virtual: int = 1
    tied: bool = True

    @property
    def config(self) -> Config:
        names = ("text", "image", "speech")
        towers = {name: names[min(k, self.towers - 1)] for k, name in enumerate(names)}
        overrides = [
            f"parallel.tensor_model_parallel_size={self.tensor}",
            f"parallel.pipeline_model_parallel_size={self.pipeline}",
            f"parallel.modality_parallel_size={self.modality}",
            f"model.untie_embeddings_and_output_weights={str(not self.tied).lower()}",
        ]
        if self.virtual > 1:
            overrides.append(f"parallel.virtual_pipeline_model_parallel_size={self.virtual}")
        config = small_config(towers, *BIG_ENOUGH, *overrides)
        check_world_size(config, self.world_size)
        return config

    @property
    def mesh(self) -> Mesh:
        return mesh_of(self.config, self.world_size)

    @property
    def placement(self) -> Placement | None:
        if self.modality == 1:
            return None
        return balanced_placement(TOWER_FLOPS[: self.towers], self.modality)


LAYOUTS = [
    Layout(256, tensor=8, pipeline=4, modality=2, towers=2),
    Layout(256, tensor=4, pipeline=2, modality=4, towers=3, virtual=2),
    Layout(256, tensor=2, pipeline=1, modality=8, towers=3),  # towers split over ranks
    Layout(256, tensor=8, pipeline=2, modality=2, towers=3, tied=False),  # two towers on a rank
    Layout(768, tensor=4, pipeline=4, modality=3, towers=2),
    Layout(1024, tensor=8, pipeline=8, modality=4, towers=2),
    Layout(1024, tensor=4, pipeline=2, modality=4, towers=3, tied=False),
    Layout(1024, tensor=8, pipeline=4, modality=1, towers=3),
]
layouts = pytest.mark.parametrize(
    "layout",
    LAYOUTS,
    ids=lambda x: f"{x.world_size}-tp{x.tensor}-pp{x.pipeline}-mp{x.modality}-k{x.towers}",
)


@layouts
def test_axes_partition_the_world(layout: Layout) -> None:
    mesh, everyone = layout.mesh, range(layout.world_size)
    axes = [
        (mesh.tensor_groups(), layout.tensor, mesh.tensor_rank),
        (mesh.data_groups(), mesh.data, mesh.data_rank),
        (mesh.modality_groups(), layout.modality, mesh.modality_rank),
        (mesh.pipeline_groups(), layout.pipeline, mesh.pipeline_rank),
    ]
    for groups, size, place in axes:
        assert sorted(rank for group in groups for rank in group) == list(everyone)
        for group in groups:
            assert [place(rank) for rank in group] == list(range(size))
    coordinates = {
        (mesh.tensor_rank(r), mesh.data_rank(r), mesh.pipeline_rank(r)) for r in everyone
    }
    assert len(coordinates) == layout.world_size
    assert layout.tensor * layout.pipeline * mesh.data == layout.world_size


@layouts
def test_placement_is_legal(layout: Layout) -> None:
    placement = layout.placement
    if placement is None:
        return
    assert placement.num_ranks == layout.modality
    assert all(placement.towers(rank) for rank in range(layout.modality))
    for tower in range(layout.towers):
        assert placement.holders(tower)
        shares = [placement.shares[rank][tower] for rank in range(layout.modality)]
        assert math.isclose(sum(shares), 1.0)
        cuts = placement.cuts(tower, 1000)
        assert (cuts[0], cuts[-1]) == (0, 1000)
        assert list(cuts) == sorted(cuts)


@layouts
def test_every_parameter_is_on_the_right_ranks(layout: Layout) -> None:
    config, mesh, placement = layout.config, layout.mesh, layout.placement
    ranks: dict[str, list[int]] = defaultdict(list)
    parameters: dict[str, HeldParameter] = {}
    copies: list[int] = []
    for rank in range(layout.world_size):
        for parameter in held_by_rank(config, mesh, placement, rank):
            if parameter.replica:
                copies.append(rank)
                continue
            parameters[parameter.name] = parameter
            ranks[parameter.name].append(rank)

    elements = 0
    last = layout.pipeline - 1
    for name, parameter in parameters.items():
        stage = mesh.pipeline_rank(ranks[name][0])
        assert stage == expected_stage(name, layout)
        # The ranks that sum its gradient: one group per tensor-parallel rank.
        modality_ranks = range(layout.modality)
        if placement is not None and parameter.tower != SHARED:
            modality_ranks = placement.holders(parameter.tower)
        groups = [
            g for g in mesh.holder_groups(modality_ranks) if mesh.pipeline_rank(g[0]) == stage
        ]
        assert len(groups) == layout.tensor
        assert sorted(rank for group in groups for rank in group) == ranks[name]
        elements += parameter.size * (layout.tensor if parameter.tensor_parallel else 1)
    assert elements == count_parameters(config.model).total
    at_the_end = [r for r in range(layout.world_size) if mesh.pipeline_rank(r) == last]
    assert copies == (at_the_end if layout.tied and last else [])


def expected_stage(name: str, layout: Layout) -> int:
    """Return the stage of a parameter; pieces are assigned to stages round-robin."""
    if name.startswith("layers."):
        layer = int(name.split(".")[1])
        return layer * layout.pipeline * layout.virtual // 8 % layout.pipeline
    return 0 if name.startswith("embedding.") else layout.pipeline - 1


@layouts
def test_process_groups_match_the_mesh(layout: Layout) -> None:
    mesh, placement = layout.mesh, layout.placement
    # The last rank, and one in the middle.
    for rank in (layout.world_size - 1, layout.world_size * 5 // 13):
        with fake_world(rank, layout.world_size):
            groups = build_process_groups(
                layout.tensor,
                torch.device("cpu"),
                pipeline_model_parallel_size=layout.pipeline,
                placement=placement,
            )
            assert groups.mesh == mesh
            assert members(groups.tensor) == own(mesh.tensor_groups(), rank)
            assert members(groups.data) == own(mesh.data_groups(), rank)
            stages = own(mesh.pipeline_groups(), rank)
            assert members(groups.pipeline) == stages
            model = [r for s in stages for r in own(mesh.tensor_groups(), s)]
            assert members(groups.model) == sorted(model)
            at_an_end = layout.pipeline > 1 and rank in (stages[0], stages[-1])
            assert (groups.embedding is not None) == at_an_end
            if groups.embedding is not None:
                assert members(groups.embedding) == [stages[0], stages[-1]]
            if placement is None:
                assert groups.modality is None
                assert groups.holders == ()
                continue
            assert groups.modality is not None
            assert members(groups.modality) == own(mesh.modality_groups(), rank)
            held = groups.towers_held(layout.towers)
            assert held == placement.towers(mesh.modality_rank(rank))
            for tower in range(layout.towers):
                holders = mesh.holder_groups(placement.holders(tower))
                if tower in held:
                    assert members(groups.reduction_group(tower)) == own(holders, rank)
                else:
                    assert groups.holders[tower] is None


@dataclass(frozen=True)
class ExpertLayout:
    """A layout of 256 ranks in which a tower's experts are split over ``experts`` ranks."""

    tensor: int
    pipeline: int
    experts: int
    placement: Placement | None
    divisible: tuple[bool, ...] = (True,)
    """Whether each tower can have experts; without a placement, one entry for all towers."""


@pytest.mark.parametrize("rank", [0, 77, 130, 255])
@pytest.mark.parametrize(
    "layout",
    [
        ExpertLayout(1, 1, 8, None),
        ExpertLayout(8, 4, 8, None),
        ExpertLayout(2, 2, 4, balanced_placement((3.0, 1.0), 2), (True, True)),
        # In each of 16 modality groups, four ranks hold the first tower, three the second and one
        # the third.
        ExpertLayout(1, 2, 4, balanced_placement((4.0, 3.0, 1.0), 8), (True, True, True)),
        # The same with a single modality group: the expert-parallel size 4 does not divide three
        # holders or one.
        ExpertLayout(4, 8, 4, balanced_placement((4.0, 3.0, 1.0), 8), (True, False, False)),
    ],
    ids=lambda x: f"tp{x.tensor}-pp{x.pipeline}-ep{x.experts}-k{len(x.divisible)}",
)
def test_expert_groups_match_the_mesh(layout: ExpertLayout, rank: int) -> None:
    placement = layout.placement
    with fake_world(rank, 256):
        groups = build_process_groups(
            layout.tensor,
            torch.device("cpu"),
            pipeline_model_parallel_size=layout.pipeline,
            expert_model_parallel_size=layout.experts,
            placement=placement,
        )
        mesh = groups.mesh
        assert len(groups.experts) == len(layout.divisible)
        for tower, divisible in enumerate(layout.divisible):
            ranks = range(1)
            if placement is not None:
                ranks = placement.holders(tower)
                if mesh.modality_rank(rank) not in ranks:
                    assert groups.experts[tower] is None
                    continue
            found = groups.experts_of(tower)
            if not divisible:  # every rank holds the whole tower, which must be plain
                assert members(found.expert) == [rank]
                assert members(found.tensor_expert) == members(groups.tensor)
                assert found.data is groups.reduction_group(tower)
                continue
            size = layout.experts
            expected = own(mesh.expert_groups(ranks, size), rank)
            assert members(found.expert) == expected
            both = own(mesh.tensor_expert_groups(ranks, size), rank)
            assert members(found.tensor_expert) == both
            same = own(mesh.expert_data_groups(ranks, size), rank)
            assert members(groups.reduction_group(tower, of_experts=True)) == same
            first = 16 // size * expected.index(rank)
            assert found.held(16) == range(first, first + 16 // size)


def members(group: dist.ProcessGroup) -> list[int]:
    return dist.get_process_group_ranks(group)


def own(groups: list[list[int]], rank: int) -> list[int]:
    (group,) = [group for group in groups if rank in group]
    return group
