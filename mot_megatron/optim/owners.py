"""Owners of a parameter: the ranks that sum its gradient and shard its optimizer state.

Without modality or expert parallelism, these are all data-parallel ranks. With modality
parallelism, only the holders of a tower own its weights; with expert parallelism, only the ranks
that hold an expert own it. DeepSpeed supports such groups only for mixtures of experts, whose
"expert data parallel" groups it finds by name. Therefore every parameter that some data-parallel
ranks do not hold is registered as an expert's.

Ranks may hold different towers, and different numbers of towers. To avoid deadlocks, collectives
over several groups must run in the group order of ``by_owners`` or in the model's parameter order.
In either case, any two ranks agree on the order of the groups that they share.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups as deepspeed_groups
from torch import nn

from mot_megatron.model.sharding import experts_of, tower_of

if TYPE_CHECKING:
    from mot_megatron.parallel.groups import ProcessGroups


@dataclass(frozen=True)
class Owned:
    """This rank's parameters that have the same owners."""

    group: dist.ProcessGroup
    """Process group of the owners."""
    name: str | None
    """Name of the group in DeepSpeed; None for the group of all data-parallel ranks."""
    parameters: list[nn.Parameter]
    """Parameters in the model's order, so that all owners have the same list."""


def has_owned_towers(groups: ProcessGroups) -> bool:
    """Return whether only some data-parallel ranks hold some tower or expert; same on all ranks."""
    split = any(group is not groups.data for group in groups.holders)
    return split or groups.expert_size > 1


def by_owners(parameters: Iterable[nn.Parameter], groups: ProcessGroups) -> list[Owned]:
    """Group this rank's parameters by owners; no collectives.

    Parameters owned by all data-parallel ranks come first. The other groups are sorted by their
    lowest tower, with the experts of a tower after its other parameters.
    """
    found: dict[dist.ProcessGroup, list[nn.Parameter]] = {}
    for parameter in parameters:
        group = groups.reduction_group(tower_of(parameter), experts_of(parameter) is not None)
        found.setdefault(group, []).append(parameter)
    owned = [
        # The name is unique to the group, even if a process creates several engines.
        Owned(group, None if group is groups.data else f"holders_{group.group_name}", held)
        for group, held in found.items()
    ]

    def order(group: Owned) -> tuple[bool, int, bool]:
        of_experts = (experts_of(parameter) is not None for parameter in group.parameters)
        return group.name is not None, min(map(tower_of, group.parameters)), all(of_experts)

    return sorted(owned, key=order)


def register_owners(owned: Iterable[Owned]) -> None:
    """Tell DeepSpeed the groups of owners that have a name, and mark their parameters.

    DeepSpeed reduces gradients in the order of the groups, and broadcasts the initial values of all
    parameters in their groups, those of frozen ones too.
    """
    for owners in owned:
        if owners.name is None:
            continue
        ranks = dist.get_process_group_ranks(owners.group)
        deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP[owners.name] = owners.group
        deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[owners.name] = ranks
        for parameter in owners.parameters:
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = owners.name  # type: ignore[attr-defined]


class OwnersModule(MoE):
    """A wrapper of the model that DeepSpeed treats as a mixture of experts.

    DeepSpeed trains parameters with their own owners only in such a module, and such a module only
    if it has some.
    """

    def __init__(self, model: nn.Module):
        """Wrap the model, whose owners are registered."""
        nn.Module.__init__(self)  # MoE.__init__ would build experts
        self.model = model
        self.num_experts = 1

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Run the forward pass of the model."""
        return self.model(*inputs, **named)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Do nothing: the groups exist. MoE would create some."""
