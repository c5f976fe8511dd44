"""RMSNorm with a weight gradient that is complete on every tensor-parallel rank."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from torch import nn

from mot_megatron.model.sharding import ParameterSharding, set_sharding


class RMSNorm(nn.Module):
    """y = x / rms(x) * weight over the last dimension.

    Args:
        size: Width of the last dimension.
        eps: Added to the mean square.
        partial_rows: The group over which rows or heads are split, under sequence parallelism or
            with heads split over tensor-parallel ranks. Backward then all-reduces the weight's
            gradient over it. None if every rank normalizes all rows.
    """

    def __init__(self, size: int, eps: float, partial_rows: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        set_sharding(self.weight, ParameterSharding((size,)))
        self.size = size
        self.eps = eps
        self.partial_rows = partial_rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize [..., size] over the last dimension."""
        weight = self.weight
        if self.partial_rows is not None:
            weight = copy_to_tensor_model_parallel_region(weight, group=self.partial_rows)
        return F.rms_norm(x, (self.size,), weight, self.eps)
