"""The interface of an objective.

Letters: g slots, h hidden size, M modalities.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import nn

from mot_megatron.model.towers import ParallelLinears


class Objective(ABC):
    """An objective holds no weights: the modules that it builds do.

    It chooses rows by their index and not by their tower, because several modalities may share a
    tower. Ranks without any such rows run its modules too, so that their weights have gradients
    and every rank calls the same collectives.
    """

    @abstractmethod
    def entry(self, linears: ParallelLinears) -> nn.Module:
        """Build the module of the first stage that makes rows [g, h] of the stream."""

    @abstractmethod
    def exit(self, linears: ParallelLinears) -> nn.Module:
        """Build the module of the last stage that sums the losses of rows [g, h].

        Its losses are a sum to differentiate, weighted by modality, and detached sums to report,
        [M] fp64. Both are sums and never means: the divisor is of the global batch, whose labels no
        rank has alone. The weights are arguments because the gradients may be computed in forward.
        """
