"""Which ranks own a parameter, that is, sum its gradient and share out its optimizer state.

Without modality parallelism all data-parallel ranks do. With it a tower's weights live on its
holders alone. DeepSpeed knows one such thing, the experts of a mixture, whose "expert data
parallel" groups it finds by name; towers that not every rank holds are registered as those. Ranks
may hold different towers and different numbers of them. Whoever runs collectives over several
groups must then take the groups in the order of ``by_owners``, or the parameters in the model's
order: either is the same on any two ranks, as far as they share groups, so none waits for another.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    """Parameters of this rank that the same ranks own."""

    group: dist.ProcessGroup
    """The owners."""
    name: str | None
    """DeepSpeed's name of the group; None for that of all data-parallel ranks."""
    parameters: list[nn.Parameter]
    """In the model's order, so that all owners have the same list."""


def has_owned_towers(groups: ProcessGroups) -> bool:
    """Whether some tower or expert lives on a part of the data-parallel ranks; all ranks agree."""
    split = any(group is not groups.data for group in groups.holders)
    return split or groups.expert_size > 1


def by_owners(parameters: Iterable[nn.Parameter], groups: ProcessGroups) -> list[Owned]:
    """Sort this rank's parameters by their owners; no collective.

    What all data-parallel ranks own comes first, then the rest by the owners' lowest tower, its
    experts last.
    """
    found: dict[dist.ProcessGroup, list[nn.Parameter]] = {}
    for parameter in parameters:
        group = groups.reduction_group(tower_of(parameter), experts_of(parameter) is not None)
        found.setdefault(group, []).append(parameter)
    owned = [
        # A name is used for one group only, however many engines a process makes.
        Owned(group, None if group is groups.data else f"holders_{group.group_name}", held)
        for group, held in found.items()
    ]

    def order(group: Owned) -> tuple[bool, int, bool]:
        of_experts = (experts_of(parameter) is not None for parameter in group.parameters)
        return group.name is not None, min(map(tower_of, group.parameters)), all(of_experts)

    return sorted(owned, key=order)


class OwnersModule(MoE):
    """The model in a wrapping that DeepSpeed takes for a mixture of experts.

    Only of those does it believe that some parameters have owners of their own.
    """

    def __init__(self, model: nn.Module, owned: Sequence[Owned]):
        """Mark the parameters that have a named group."""
        nn.Module.__init__(self)  # not MoE's, which builds experts
        self.model = model
        self.num_experts = 1
        self._groups = {o.name: o.group for o in owned if o.name is not None}
        for group in owned:
            if group.name is not None:
                for parameter in group.parameters:
                    parameter.allreduce = False  # type: ignore[attr-defined]
                    parameter.group_name = group.name  # type: ignore[attr-defined]

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """The model's."""
        return self.model(*inputs, **named)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:  # noqa: ARG002
        """Called by DeepSpeed before it looks up groups. The order matters: it reduces in it."""
        for name, group in self._groups.items():
            ranks = dist.get_process_group_ranks(group)
            deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP[name] = group
            deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = ranks
