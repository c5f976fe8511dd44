"""Rank arithmetic of the parallel axes, without process groups.

In global ranks, the tensor-parallel rank varies fastest, then modality, data and pipeline. This is
megatron's order, with a modality group as consecutive data-parallel ranks. It places the ranks that
communicate most on the same node.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Mesh:
    """Sizes of the parallel axes of a job; their product must divide the world size."""

    world_size: int
    tensor: int
    pipeline: int = 1
    modality: int = 1

    @property
    def data(self) -> int:
        """Data-parallel size: world size divided by tensor- and pipeline-parallel size.

        A modality group consists of ``modality`` consecutive data-parallel ranks.
        """
        return self.world_size // (self.tensor * self.pipeline)

    def tensor_rank(self, rank: int) -> int:
        """Return the position of a global rank in its tensor-parallel group."""
        return rank % self.tensor

    def data_rank(self, rank: int) -> int:
        """Return the position of a global rank in its data-parallel group."""
        return rank // self.tensor % self.data

    def modality_rank(self, rank: int) -> int:
        """Return the position of a global rank in its modality group."""
        return self.data_rank(rank) % self.modality

    def pipeline_rank(self, rank: int) -> int:
        """Return the pipeline stage of a global rank, its position in its pipeline group."""
        return rank // (self.tensor * self.data)

    def tensor_groups(self) -> list[list[int]]:
        """Return the global ranks of every tensor-parallel group."""
        return [
            list(range(first, first + self.tensor))
            for first in range(0, self.world_size, self.tensor)
        ]

    def data_groups(self) -> list[list[int]]:
        """Return the global ranks of every data-parallel group.

        The ranks of a group have the same pipeline stage and the same tensor-parallel rank.
        """
        stage = self.tensor * self.data
        return [
            list(range(first + tensor, first + stage, self.tensor))
            for first in range(0, self.world_size, stage)
            for tensor in range(self.tensor)
        ]

    def modality_groups(self) -> list[list[int]]:
        """Return the global ranks of every modality group."""
        return [
            group[first : first + self.modality]
            for group in self.data_groups()
            for first in range(0, self.data, self.modality)
        ]

    def pipeline_groups(self) -> list[list[int]]:
        """Return the global ranks of every pipeline group, in stage order."""
        stage = self.tensor * self.data
        return [list(range(first, self.world_size, stage)) for first in range(stage)]

    def holder_groups(self, modality_ranks: Iterable[int]) -> list[list[int]]:
        """Return every data-parallel group, restricted to the given modality ranks.

        If these are the modality ranks that hold a tower, the groups are the ranks over which the
        tower's gradients are summed.
        """
        chosen = set(modality_ranks)
        return [
            [rank for rank in group if self.modality_rank(rank) in chosen]
            for group in self.data_groups()
        ]

    def expert_groups(self, modality_ranks: Iterable[int], size: int) -> list[list[int]]:
        """Return the groups of ``size`` consecutive holders of a tower that split its experts."""
        return [
            holders[first : first + size]
            for holders in self.holder_groups(modality_ranks)
            for first in range(0, len(holders), size)
        ]

    def expert_data_groups(self, modality_ranks: Iterable[int], size: int) -> list[list[int]]:
        """Return the groups of holders of a tower that hold the same experts."""
        return [
            holders[position::size]
            for holders in self.holder_groups(modality_ranks)
            for position in range(size)
        ]

    def tensor_expert_groups(self, modality_ranks: Iterable[int], size: int) -> list[list[int]]:
        """Return the expert groups merged over tensor-parallel ranks, which vary fastest."""
        return [
            [rank + tensor for rank in group for tensor in range(self.tensor)]
            for group in self.expert_groups(modality_ranks, size)
            if self.tensor_rank(group[0]) == 0
        ]
