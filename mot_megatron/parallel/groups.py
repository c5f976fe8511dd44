"""Process groups of this rank, made once and handed down; nothing looks them up globally.

They are built by megatron's ``parallel_state`` because a few megatron functions (its
vocabulary-parallel loss) read that global state and take no group.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed import HashStore  # type: ignore[attr-defined]

from mot_megatron.parallel.cpu import adapt_megatron_to_cpu
from mot_megatron.parallel.mesh import Mesh
from mot_megatron.parallel.placement import Placement
from mot_megatron.parallel.timeouts import COLLECTIVE_TIMEOUT


@dataclass(frozen=True)
class ExpertGroups:
    """Where the experts of a tower that this rank holds lie."""

    expert: dist.ProcessGroup
    """Ranks that hold the tower's experts together, equally many each, in the experts' order."""
    tensor_expert: dist.ProcessGroup
    """Their tensor-parallel groups together; tensor parallelism is fastest."""
    data: dist.ProcessGroup
    """Ranks that hold the same experts: gradients are summed over these."""

    def held(self, num_experts: int) -> range:
        """The experts that this rank holds, of ``num_experts``, which the group's size divides."""
        share = num_experts // self.expert.size()
        return range(self.expert.rank() * share, (self.expert.rank() + 1) * share)


@dataclass(frozen=True)
class ProcessGroups:
    """The groups this rank belongs to, and where it works."""

    tensor: dist.ProcessGroup
    """Ranks that share every matrix."""
    data: dist.ProcessGroup
    """Ranks with the same shared weights and different sequences; modality groups lie inside."""
    model: dist.ProcessGroup
    """Tensor and pipeline parallelism together."""
    pipeline: dist.ProcessGroup
    """The stages of one pipeline, in order."""
    embedding: dist.ProcessGroup | None
    """First and last stage, which both hold a tied embedding; None elsewhere and without stages."""
    modality: dist.ProcessGroup | None
    """Ranks that hold the towers together; None without modality parallelism."""
    holders: tuple[dist.ProcessGroup | None, ...]
    """Per tower: the ranks over which its gradients are summed; None if this rank is not one.

    Empty without modality parallelism, where every data-parallel rank holds every tower.
    """
    experts: tuple[ExpertGroups | None, ...]
    """Per tower; None if this rank does not hold it. Without modality parallelism one for all."""
    mesh: Mesh
    placement: Placement | None
    """None without modality parallelism."""
    rank: int
    device: torch.device

    @property
    def tensor_rank(self) -> int:
        """This rank's position in its tensor-parallel group."""
        return self.mesh.tensor_rank(self.rank)

    @property
    def tensor_size(self) -> int:
        """Ranks in the tensor-parallel group."""
        return self.mesh.tensor

    @property
    def data_rank(self) -> int:
        """This rank's position in its data-parallel group."""
        return self.mesh.data_rank(self.rank)

    @property
    def data_size(self) -> int:
        """Ranks in the data-parallel group."""
        return self.mesh.data

    @property
    def pipeline_rank(self) -> int:
        """This rank's pipeline stage."""
        return self.mesh.pipeline_rank(self.rank)

    @property
    def pipeline_size(self) -> int:
        """Pipeline stages."""
        return self.mesh.pipeline

    @property
    def modality_rank(self) -> int:
        """This rank's position in its modality-parallel group."""
        return self.mesh.modality_rank(self.rank)

    @property
    def modality_size(self) -> int:
        """Ranks in the modality-parallel group."""
        return self.mesh.modality

    @property
    def expert_size(self) -> int:
        """Ranks over which the experts of this rank's towers are spread."""
        return max(groups.expert.size() for groups in self.experts if groups is not None)

    def towers_held(self, num_towers: int) -> tuple[int, ...]:
        """The towers whose weights this rank holds, ascending."""
        if self.placement is None:
            return tuple(range(num_towers))
        return self.placement.towers(self.modality_rank)

    def experts_of(self, tower: int) -> ExpertGroups:
        """Where the experts of a tower lie, which this rank holds."""
        found = self.experts[tower if self.holders else 0]
        assert found is not None, f"this rank holds no weights of tower {tower}"
        return found

    def reduction_group(self, tower: int, of_experts: bool = False) -> dist.ProcessGroup:
        """The ranks over which gradients of a tower, or of SHARED (-1) weights, are summed.

        Those of its routed experts, if ``of_experts``, lie on fewer ranks under expert parallelism.
        """
        if of_experts:
            return self.experts_of(tower).data
        if tower < 0 or not self.holders:
            return self.data
        group = self.holders[tower]
        assert group is not None, f"this rank holds no weights of tower {tower}"
        return group


def build_process_groups(
    tensor_model_parallel_size: int,
    device: torch.device,
    *,
    pipeline_model_parallel_size: int = 1,
    expert_model_parallel_size: int = 1,
    placement: Placement | None = None,
    timeout: timedelta = COLLECTIVE_TIMEOUT,
) -> ProcessGroups:
    """Make the groups of a world that ``torch.distributed`` has already set up.

    Every rank calls this once, with the same arguments; the world size must be divisible by the
    product of the sizes, that of the modality-parallel groups being the placement's. Towers whose
    holders ``expert_model_parallel_size`` does not divide cannot have experts. ``timeout`` holds
    for collectives of the new groups, in whole minutes (megatron takes no others).
    """
    if device.type == "cpu":
        adapt_megatron_to_cpu()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
        distributed_timeout_minutes=timeout // timedelta(minutes=1),
        create_gloo_process_groups=False,
    )
    mesh = Mesh(
        dist.get_world_size(),
        tensor_model_parallel_size,
        pipeline_model_parallel_size,
        1 if placement is None else placement.num_ranks,
    )
    return _initialized_groups(mesh, placement, device, timeout, expert_model_parallel_size)


def build_single_process_groups(device: torch.device) -> ProcessGroups:
    """A world of one, without a launcher: for tools and single-rank tests.

    Made once per process: torch never ends the threads of a group, dozens for megatron's groups.
    """
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        return build_process_groups(1, device)
    if device.type == "cpu":
        adapt_megatron_to_cpu()
    return _initialized_groups(Mesh(1, 1), None, device, COLLECTIVE_TIMEOUT)


def _initialized_groups(
    mesh: Mesh,
    placement: Placement | None,
    device: torch.device,
    timeout: timedelta,
    expert_size: int = 1,
) -> ProcessGroups:
    rank, data = dist.get_rank(), _present(parallel_state.get_data_parallel_group())
    modality, holders = None, ()
    if placement is not None:
        modality = _own_group(mesh.modality_groups(), rank, timeout)
        holders = _holder_groups(mesh, placement, data, rank, timeout)
    experts = _expert_groups(mesh, placement, holders or (data,), rank, timeout, expert_size)
    at_an_end = mesh.pipeline > 1 and mesh.pipeline_rank(rank) in (0, mesh.pipeline - 1)
    return ProcessGroups(
        tensor=_present(parallel_state.get_tensor_model_parallel_group()),
        data=data,
        model=_present(parallel_state.get_model_parallel_group()),
        pipeline=_present(parallel_state.get_pipeline_model_parallel_group()),
        embedding=_present(parallel_state.get_embedding_group()) if at_an_end else None,
        modality=modality,
        holders=holders,
        experts=experts,
        mesh=mesh,
        placement=placement,
        rank=rank,
        device=device,
    )


def _holder_groups(
    mesh: Mesh, placement: Placement, data: dist.ProcessGroup, rank: int, timeout: timedelta
) -> tuple[dist.ProcessGroup | None, ...]:
    """One group per set of holders, not per tower: towers held together share theirs."""
    made: dict[tuple[int, ...], dist.ProcessGroup | None] = {
        tuple(range(mesh.modality)): data  # held by all: the group is there already
    }
    for tower in range(placement.num_towers):
        holders = placement.holders(tower)
        if holders not in made:
            made[holders] = _own_group(mesh.holder_groups(holders), rank, timeout)
    return tuple(made[placement.holders(tower)] for tower in range(placement.num_towers))


def _expert_groups(
    mesh: Mesh,
    placement: Placement | None,
    holders: tuple[dist.ProcessGroup | None, ...],
    rank: int,
    timeout: timedelta,
    size: int,
) -> tuple[ExpertGroups | None, ...]:
    """As ``holders``: one set of groups for towers that are held together."""
    alone = _present(parallel_state.get_expert_model_parallel_group())
    tensor = _present(parallel_state.get_tensor_model_parallel_group())
    made: dict[tuple[int, ...], ExpertGroups | None] = {}
    everyone = tuple(range(mesh.modality))
    of_towers = [
        placement.holders(tower) if placement else everyone for tower in range(len(holders))
    ]
    for ranks, holding in zip(of_towers, holders, strict=True):
        if ranks in made:
            continue
        if size == 1 or len(ranks) * mesh.data // mesh.modality % size:
            made[ranks] = holding and ExpertGroups(alone, tensor, holding)
            continue
        expert = _own_group(mesh.expert_groups(ranks, size), rank, timeout)
        both = _own_group(mesh.tensor_expert_groups(ranks, size), rank, timeout)
        data = _own_group(mesh.expert_data_groups(ranks, size), rank, timeout)
        made[ranks] = ExpertGroups(expert, both, data) if expert and both and data else None
    return tuple(made[ranks] for ranks in of_towers)


def _own_group(
    all_groups: list[list[int]], rank: int, timeout: timedelta
) -> dist.ProcessGroup | None:
    """Make every group, as torch asks of every rank; return the one that this rank is in."""
    own = None
    for ranks in all_groups:
        group = dist.new_group(ranks, timeout=timeout)
        if rank in ranks:
            own = _present(group)
    return own


def _present(group: dist.ProcessGroup | list[dist.ProcessGroup] | int | None) -> dist.ProcessGroup:
    """The group; torch gives a number or nothing to a process outside of it."""
    assert isinstance(group, dist.ProcessGroup)
    return group
