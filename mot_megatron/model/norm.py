"""RMSNorm with a weight gradient that is complete on every tensor-parallel rank."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from torch import nn

from mot_megatron.model.operations import LayerOperations
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
        return self.normalize(x)

    def normalize(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize, also for a subclass with another ``forward``."""
        return F.rms_norm(x, (self.size,), self.summed_weight(), self.eps)

    def summed_weight(self) -> torch.Tensor:
        """Return the weight, whose gradient backward sums over ``partial_rows``."""
        if self.partial_rows is None:
            return self.weight
        return copy_to_tensor_model_parallel_region(self.weight, group=self.partial_rows)


class ResidualNorm(RMSNorm):
    """RMSNorm with the residual addition beside it; which comes first is ``norms_sum``.

    Args:
        size: Width of the rows.
        eps: Added to the mean square.
        partial_rows: As for ``RMSNorm``.
        operations: The implementation to use.
        norms_sum: Whether it normalizes the sum (pre-norm) or the update (post-norm).
    """

    def __init__(
        self,
        size: int,
        eps: float,
        partial_rows: dist.ProcessGroup | None,
        operations: LayerOperations,
        norms_sum: bool,
    ) -> None:
        super().__init__(size, eps, partial_rows)
        self.operations = operations
        self.norms_sum = norms_sum

    def forward(  # type: ignore[override]
        self, update: torch.Tensor, residual: torch.Tensor
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return residual + norm(update), or s = residual + update and norm(s); rows [n, size]."""
        add = self.operations.add_then_norm if self.norms_sum else self.operations.norm_then_add
        return add(update, residual, self.summed_weight(), self.eps)
