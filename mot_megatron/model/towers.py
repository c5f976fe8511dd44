"""One module per tower, or one shared by all: the untying that makes a Mixture-of-Transformers.

Every layer component with weights is a ``PerTower``; the configuration says which are untied.
Parallel linear layers are megatron's, built here with the sharding that checkpoints need.
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
    """One module for each tower that this rank holds, or one module that all towers share.

    Parameters are named ``towers.<k>...`` or ``shared...`` and carry an attribute ``tower``.
    """

    def __init__(
        self, make: Callable[[int], nn.Module], towers: Sequence[int], untied: bool
    ) -> None:
        """Call ``make`` with each tower's index, or only with the first one if tied."""
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
        """Apply each tower's module to that tower's slice, even if the slice has zero rows.

        An absent modality must still run: its weights then get zero gradients, and every rank calls
        every collective in the same order.

        Args:
            slices: One slice per tower held.
            others: Further arguments of the modules, each with one item per tower held.
        """
        return tuple(
            module(*of_tower)
            for module, *of_tower in zip(self.modules_of_slices, slices, *others, strict=True)
        )

    @property
    def modules_of_slices(self) -> list[nn.Module]:
        """The module of each slice."""
        return list(self.towers.values()) if self.untied else [self.shared] * self.num_held


@dataclass(frozen=True)
class ParallelLinears:
    """A factory of megatron's parallel linear layers, without initialization of weights."""

    groups: ProcessGroups
    sequence_parallel: bool
    dtype: torch.dtype

    @cached_property
    def megatron_config(self) -> ModelParallelConfig:
        """The configuration that megatron's layers read."""
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

    def column(
        self, input_size: int, output_shape: tuple[int, ...], bias: bool = False
    ) -> ColumnLinear:
        """Build a column-parallel layer; the last dimension of ``output_shape`` is split.

        Use (ffn,) for a plain layer and (2, ffn) for two stacked ones, each of which is split. A
        bias starts at zero and is split as the output is.
        """
        return ColumnLinear(self, input_size, output_shape, bias)

    def row(self, input_size: int, output_size: int) -> RowLinear:
        """Build a row-parallel layer: split inputs, output summed over the ranks."""
        return RowLinear(self, input_size, output_size)


def _no_initialization(_: torch.Tensor) -> None:
    """Do nothing: megatron requires a method, and ``initialize_parameters`` fills the weights."""


class ColumnLinear(nn.Module):
    """Column-parallel linear layer: [n, input] -> [m, output / tp].

    m = n, or n * tp under sequence parallelism. Collectives over the tensor-parallel group: none in
    forward and an all-reduce of the input's gradient in backward; under sequence parallelism an
    all-gather in forward, and an all-gather and a reduce-scatter in backward.
    """

    def __init__(
        self, linears: ParallelLinears, input_size: int, output_shape: tuple[int, ...], bias: bool
    ) -> None:
        super().__init__()
        output_size = torch.Size(output_shape).numel()
        self.linear = ColumnParallelLinear(
            input_size,
            output_size,
            config=linears.megatron_config,
            init_method=_no_initialization,
            bias=bias,
            tp_group=linears.groups.tensor,
        )
        split = len(output_shape) - 1
        set_sharding(self.linear.weight, ParameterSharding((*output_shape, input_size), split))
        if self.linear.bias is not None:
            nn.init.zeros_(self.linear.bias)
            set_sharding(self.linear.bias, ParameterSharding(output_shape, split))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply by this rank's rows of the weight, and add its part of the bias."""
        return self.linear(x)[0]


class RowLinear(nn.Module):
    """Row-parallel linear layer: [m, input / tp] -> [n, output].

    n = m, or m / tp under sequence parallelism. Collectives over the tensor-parallel group: an
    all-reduce in forward and none in backward; under sequence parallelism a reduce-scatter in
    forward and an all-gather in backward.
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
