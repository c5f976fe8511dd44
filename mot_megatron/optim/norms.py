"""Gradient norms, in total and per tower, from the parts of the gradients on all ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from mot_megatron.model.sharding import SHARED, is_auxiliary, tower_of


@dataclass(frozen=True)
class StepNorms:
    """L2 norms of the gradients of one optimizer step before clipping; equal on all ranks."""

    total: float
    """Norm over all parameters of the model, without the auxiliary ones."""
    shared: float
    """Norm over the parameters that all towers share."""
    per_tower: tuple[float, ...]
    """Norm over each tower's untied parameters, by tower index."""
    auxiliary: float = 0.0
    """Norm over the parameters trained beside the model (causal routers), which no other norm
    includes."""

    @property
    def finite(self) -> bool:
        """Whether all gradients on all ranks were finite; if not, the step changed no weight."""
        return math.isfinite(self.total + self.auxiliary)


def step_norms(
    gradients: Iterable[tuple[nn.Parameter, torch.Tensor]],
    num_towers: int,
    device: torch.device,
) -> StepNorms:
    """Compute the norms of gradients that are spread over all ranks.

    Collectives: one all-reduce of ``num_towers + 2`` squared norms over the world.

    Args:
        gradients: Pairs of a parameter and a part of its gradient. Every element of every
            parameter's gradient must occur on exactly one rank of the world, once.
        num_towers: K, the same on all ranks.
        device: Device on which the process group of the world communicates.
    """
    parts: list[list[torch.Tensor]] = [[] for _ in range(num_towers + 2)]
    for parameter, gradient in gradients:
        parts[-1 if is_auxiliary(parameter) else tower_of(parameter) - SHARED].append(gradient)
    squares = torch.stack([_squared_norm(tensors).to(device) for tensors in parts])
    dist.all_reduce(squares)
    *values, of_auxiliary = squares.tolist()
    shared, *per_tower = map(math.sqrt, values)
    return StepNorms(
        total=math.sqrt(sum(values)),
        shared=shared,
        per_tower=tuple(per_tower),
        auxiliary=math.sqrt(of_auxiliary),
    )


def _squared_norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    return nn.utils.get_total_norm(tensors, norm_type=2.0).double().square()
