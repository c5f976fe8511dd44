"""The process groups of this rank: built once, then passed explicitly instead of looked up.

megatron's ``parallel_state`` builds those that it knows, because a few megatron functions, such as
the vocabulary-parallel loss, take no group and read that global state.
"""

from __future__ import annotations

from collections.abc import Iterable
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
    """Process groups for the experts of a tower that this rank holds."""

    expert: dist.ProcessGroup
    """Expert-parallel group: its ranks split the tower's experts equally, in order."""
    tensor_expert: dist.ProcessGroup
    """Union of the tensor-parallel groups of the ranks in ``expert``; the tensor rank varies
    fastest."""
    data: dist.ProcessGroup
    """Ranks that hold the same experts; gradients of the experts are summed over them."""

    def held(self, num_experts: int) -> range:
        """Return which of ``num_experts`` this rank holds; the group size must divide them."""
        share = num_experts // self.expert.size()
        return range(self.expert.rank() * share, (self.expert.rank() + 1) * share)


@dataclass(frozen=True)
class ProcessGroups:
    """The process groups of this rank, its position in the mesh and its device."""

    tensor: dist.ProcessGroup
    """Tensor-parallel group: ranks over which every matrix is split."""
    data: dist.ProcessGroup
    """Data-parallel group: ranks with the same pipeline stage and tensor-parallel rank. Consists
    of whole modality groups."""
    model: dist.ProcessGroup
    """Combined tensor- and pipeline-parallel group."""
    pipeline: dist.ProcessGroup
    """Stages of one pipeline, in order."""
    embedding: dist.ProcessGroup | None
    """First and last stage of a pipeline, which both hold a tied embedding. None on other stages
    and without pipeline parallelism."""
    modality: dist.ProcessGroup | None
    """Modality group: ranks that hold the towers between them. None without modality
    parallelism."""
    holders: tuple[dist.ProcessGroup | None, ...]
    """Per tower, the data-parallel ranks that hold it, over which its gradients are summed. None
    for a tower that this rank does not hold.

    Empty without modality parallelism: every data-parallel rank then holds every tower.
    """
    experts: tuple[ExpertGroups | None, ...]
    """Groups per tower; None for a tower that this rank does not hold. Without modality
    parallelism, a single entry for all towers."""
    balancing: dict[int, dist.ProcessGroup]
    """By tower, the ranks of a modality group that hold it, with their tensor-parallel peers: they
    count the experts of a sequence's tokens together. Only for towers that this rank holds, whose
    experts a loss balances, and that several ranks of a modality group hold."""
    mesh: Mesh
    placement: Placement | None
    """Which ranks of a modality group hold which towers; None without modality parallelism."""
    rank: int
    device: torch.device

    @property
    def tensor_rank(self) -> int:
        """This rank's position in its tensor-parallel group."""
        return self.mesh.tensor_rank(self.rank)

    @property
    def tensor_size(self) -> int:
        """Number of ranks in a tensor-parallel group."""
        return self.mesh.tensor

    @property
    def data_rank(self) -> int:
        """This rank's position in its data-parallel group."""
        return self.mesh.data_rank(self.rank)

    @property
    def data_size(self) -> int:
        """Number of ranks in a data-parallel group."""
        return self.mesh.data

    @property
    def pipeline_rank(self) -> int:
        """This rank's pipeline stage."""
        return self.mesh.pipeline_rank(self.rank)

    @property
    def pipeline_size(self) -> int:
        """Number of pipeline stages."""
        return self.mesh.pipeline

    @property
    def modality_rank(self) -> int:
        """This rank's position in its modality group."""
        return self.mesh.modality_rank(self.rank)

    @property
    def modality_size(self) -> int:
        """Number of ranks in a modality group."""
        return self.mesh.modality

    @property
    def expert_size(self) -> int:
        """Largest expert-parallel size among the towers of this rank."""
        return max(groups.expert.size() for groups in self.experts if groups is not None)

    def towers_held(self, num_towers: int) -> tuple[int, ...]:
        """Return the indices of the towers that this rank holds, in ascending order."""
        if self.placement is None:
            return tuple(range(num_towers))
        return self.placement.towers(self.modality_rank)

    def experts_of(self, tower: int) -> ExpertGroups:
        """Return the groups for the experts of a tower that this rank holds."""
        found = self.experts[tower if self.holders else 0]
        assert found is not None, f"this rank holds no weights of tower {tower}"
        return found

    def reduction_group(self, tower: int, of_experts: bool = False) -> dist.ProcessGroup:
        """Return the group over which gradients of a tower or of SHARED (-1) weights are summed.

        With ``of_experts``, return the group for the tower's routed experts, which is smaller under
        expert parallelism.
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
    balanced_towers: Iterable[int] = (),
    timeout: timedelta = COLLECTIVE_TIMEOUT,
) -> ProcessGroups:
    """Build all process groups in a world that ``torch.distributed`` has already initialized.

    Every rank calls this once, with the same arguments. The world size must be divisible by the
    product of the tensor-parallel size, the pipeline-parallel size and the number of ranks in the
    placement. If ``expert_model_parallel_size`` does not divide the number of data-parallel ranks
    that hold a tower, that tower cannot have experts. ``balanced_towers`` are the towers whose
    experts a loss balances. ``timeout`` applies to collectives of the new
    groups and is rounded down to whole minutes, because megatron accepts no other.
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
    return _initialized_groups(
        mesh, placement, device, timeout, expert_model_parallel_size, balanced_towers
    )


def build_single_process_groups(device: torch.device) -> ProcessGroups:
    """Build the groups of a single-process world without a launcher, for tools and tests.

    The groups are created once per process: torch never stops a group's threads, and megatron's
    groups have dozens of them.
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
    balanced_towers: Iterable[int] = (),
) -> ProcessGroups:
    rank, data = dist.get_rank(), _present(parallel_state.get_data_parallel_group())
    modality, holders = None, ()
    if placement is not None:
        modality = _own_group(mesh.modality_groups(), rank, timeout)
        holders = _holder_groups(mesh, placement, data, rank, timeout)
    experts = _expert_groups(mesh, placement, holders or (data,), rank, timeout, expert_size)
    balancing = _balancing_groups(mesh, placement, balanced_towers, rank, timeout)
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
        balancing=balancing,
        mesh=mesh,
        placement=placement,
        rank=rank,
        device=device,
    )


def _holder_groups(
    mesh: Mesh, placement: Placement, data: dist.ProcessGroup, rank: int, timeout: timedelta
) -> tuple[dist.ProcessGroup | None, ...]:
    """Return a group per tower; towers held by the same ranks share one."""
    made: dict[tuple[int, ...], dist.ProcessGroup | None] = {
        tuple(range(mesh.modality)): data  # held by all ranks: the group exists
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
    """Return expert groups per entry of ``holders``; towers on the same ranks share them."""
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


def _balancing_groups(
    mesh: Mesh, placement: Placement | None, towers: Iterable[int], rank: int, timeout: timedelta
) -> dict[int, dist.ProcessGroup]:
    made: dict[int, dist.ProcessGroup] = {}
    if placement is None:
        return made
    for tower in towers:
        holders = placement.holders(tower)
        if len(holders) > 1:
            groups = mesh.tensor_expert_groups(holders, len(holders))
            if (own := _own_group(groups, rank, timeout)) is not None:
                made[tower] = own
    return made


def _own_group(
    all_groups: list[list[int]], rank: int, timeout: timedelta
) -> dist.ProcessGroup | None:
    """Create all groups, which every rank must do, and return the one that contains this rank."""
    own = None
    for ranks in all_groups:
        group = dist.new_group(ranks, timeout=timeout)
        if rank in ranks:
            own = _present(group)
    return own


def _present(group: dist.ProcessGroup | list[dist.ProcessGroup] | int | None) -> dist.ProcessGroup:
    """Narrow the type to a group; torch returns a number or None to ranks outside of it."""
    assert isinstance(group, dist.ProcessGroup)
    return group
