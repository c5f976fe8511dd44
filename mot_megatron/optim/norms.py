"""Gradient norms, in total and per tower, from whatever part of the gradients a rank holds."""

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
    shared: float
    """Of the parameters that all towers share."""
    per_tower: tuple[float, ...]
    """Of each tower's untied parameters, by tower index."""
    auxiliary: float = 0.0
    """Of what learns beside the model, its causal routers; part of none of the others."""

    @property
    def finite(self) -> bool:
        """False if any gradient on any rank was NaN or infinite: the step was not taken."""
        return math.isfinite(self.total + self.auxiliary)


def step_norms(
    gradients: Iterable[tuple[nn.Parameter, torch.Tensor]],
    num_towers: int,
    device: torch.device,
) -> StepNorms:
    """Norms of a gradient whose parts are spread over all ranks.

    One all-reduce of num_towers + 2 squared sums over the world.

    Args:
        gradients: (parameter, part of its gradient) pairs. Over all ranks of the world together
            each element of each parameter's gradient must appear exactly once.
        num_towers: K, the same on all ranks.
        device: Where the process group of the world communicates.
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
