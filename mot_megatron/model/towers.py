"""One module per tower, or one for all: the untying that makes a Mixture-of-Transformers.

Every component of a layer that has weights is a ``PerTower``; the configuration says which are
untied. Parallel linear layers are megatron's, made here with the layout that checkpoints need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import nn

from mot_megatron.model.sharding import SHARED, ParameterSharding, mark_tower, set_sharding
from mot_megatron.parallel.groups import ProcessGroups


class PerTower(nn.Module):
    """A module per tower that this rank holds, with its own weights, or one that all share.

    Parameters are named ``towers.<k>...`` or ``shared...`` and carry an attribute ``tower``.
    """

    def __init__(
        self, make: Callable[[int], nn.Module], towers: Sequence[int], untied: bool
    ) -> None:
        """Call ``make`` with every tower's index; with the first's for a module that all share."""
        super().__init__()
        self.num_held = len(towers)
        if untied:
            self.towers = nn.ModuleDict({str(tower): make(tower) for tower in towers})
            for tower, module in self.towers.items():
                mark_tower(module, int(tower))
        else:
            self.shared = make(towers[0])
            mark_tower(self.shared, SHARED)
        self.untied = untied

    def forward(
        self, slices: Sequence[torch.Tensor], *others: Sequence[Any]
    ) -> tuple[torch.Tensor, ...]:
        """Each tower's module on that tower's slice, zero rows included; one slice per tower held.

        What else a module needs comes in ``others``, each one item per tower held. An absent
        modality must still run: its weights then get zero gradients, and every rank calls every
        collective in the same order.
        """
        modules = self.towers.values() if self.untied else [self.shared] * self.num_held
        return tuple(
            module(*of_tower) for module, *of_tower in zip(modules, slices, *others, strict=True)
        )


@dataclass(frozen=True)
class ParallelLinears:
    """Makes megatron's parallel linear layers, without biases and without initializing them."""

    groups: ProcessGroups
    sequence_parallel: bool
    dtype: torch.dtype

    @cached_property
    def megatron_config(self) -> ModelParallelConfig:
        """What megatron's layers read of a configuration."""
        return ModelParallelConfig(
            tensor_model_parallel_size=self.groups.tensor_size,
            sequence_parallel=self.sequence_parallel,
            use_cpu_initialization=True,
            perform_initialization=False,
            params_dtype=self.dtype,
            gradient_accumulation_fusion=False,
        )

    @property
    def partial_rows(self) -> dist.ProcessGroup | None:
        """The group over which the stream's rows are split, for norms of the stream."""
        return self.groups.tensor if self.sequence_parallel else None

    @property
    def partial_heads(self) -> dist.ProcessGroup | None:
        """The group over which heads are split, for norms of queries and keys."""
        return self.groups.tensor if self.groups.tensor_size > 1 else None

    def column(self, input_size: int, output_shape: tuple[int, ...]) -> ColumnLinear:
        """A linear layer whose outputs are split; ``output_shape`` is split in its last dimension.

        (ffn,) for a plain layer; (2, ffn) for two stacked ones, of which each rank has its part.
        """
        return ColumnLinear(self, input_size, output_shape)

    def row(self, input_size: int, output_size: int) -> RowLinear:
        """A linear layer whose inputs are split and whose output is summed over the ranks."""
        return RowLinear(self, input_size, output_size)


def _no_initialization(_: torch.Tensor) -> None:
    """Megatron wants a method; weights are filled by ``initialize_parameters``."""


class ColumnLinear(nn.Module):
    """[n, input] -> [m, output / tp]; m = n, or n * tp under sequence parallelism.

    Collectives over tensor parallelism: forward none (sequence parallel: all-gather), backward
    all-reduce of the input's gradient (sequence parallel: all-gather and reduce-scatter).
    """

    def __init__(
        self, linears: ParallelLinears, input_size: int, output_shape: tuple[int, ...]
    ) -> None:
        super().__init__()
        output_size = torch.Size(output_shape).numel()
        self.linear = ColumnParallelLinear(
            input_size,
            output_size,
            config=linears.megatron_config,
            init_method=_no_initialization,
            bias=False,
            tp_group=linears.groups.tensor,
        )
        sharding = ParameterSharding((*output_shape, input_size), shard_dim=len(output_shape) - 1)
        set_sharding(self.linear.weight, sharding)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply by this rank's rows of the weight."""
        return self.linear(x)[0]


class RowLinear(nn.Module):
    """[m, input / tp] -> [n, output]; n = m, or m / tp under sequence parallelism.

    Collectives over tensor parallelism: forward all-reduce (sequence parallel: reduce-scatter),
    backward none (sequence parallel: all-gather).
    """

    def __init__(self, linears: ParallelLinears, input_size: int, output_size: int) -> None:
        super().__init__()
        self.linear = RowParallelLinear(
            input_size,
            output_size,
            config=linears.megatron_config,
            init_method=_no_initialization,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=linears.groups.tensor,
        )
        set_sharding(self.linear.weight, ParameterSharding((output_size, input_size), shard_dim=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply by this rank's columns of the weight and sum over the ranks."""
        return self.linear(x)[0]
