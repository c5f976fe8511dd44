"""Arithmetic of the parallel axes, without any process group.

Ranks are numbered with tensor parallelism fastest, then modality, data and pipeline parallelism
(Megatron's order, in which a modality group is a run of neighbors inside data parallelism), so
that the ranks that talk most sit on one node.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Mesh:
    """Sizes of the axes of a job; the world size is divisible by their product."""

    world_size: int
    tensor: int
    pipeline: int = 1
    modality: int = 1

    @property
    def data(self) -> int:
        """Ranks that load different sequences: what tensor and pipeline parallelism leave.

        Modality parallelism lies inside: its groups are runs of ``modality`` of these ranks.
        """
        return self.world_size // (self.tensor * self.pipeline)

    def tensor_rank(self, rank: int) -> int:
        """Position of a global rank in its tensor-parallel group."""
        return rank % self.tensor

    def data_rank(self, rank: int) -> int:
        """Position of a global rank in its data-parallel group."""
        return rank // self.tensor % self.data

    def modality_rank(self, rank: int) -> int:
        """Position of a global rank in its modality-parallel group."""
        return self.data_rank(rank) % self.modality

    def pipeline_rank(self, rank: int) -> int:
        """Pipeline stage of a global rank, which is its position in its pipeline group."""
        return rank // (self.tensor * self.data)

    def tensor_groups(self) -> list[list[int]]:
        """Global ranks of every tensor-parallel group."""
        return [
            list(range(first, first + self.tensor))
            for first in range(0, self.world_size, self.tensor)
        ]

    def data_groups(self) -> list[list[int]]:
        """Global ranks of every data-parallel group: one stage, one tensor-parallel rank."""
        stage = self.tensor * self.data
        return [
            list(range(first + tensor, first + stage, self.tensor))
            for first in range(0, self.world_size, stage)
            for tensor in range(self.tensor)
        ]

    def modality_groups(self) -> list[list[int]]:
        """Global ranks of every modality-parallel group."""
        return [
            group[first : first + self.modality]
            for group in self.data_groups()
            for first in range(0, self.data, self.modality)
        ]

    def pipeline_groups(self) -> list[list[int]]:
        """Global ranks of every pipeline group, in the order of the stages."""
        stage = self.tensor * self.data
        return [list(range(first, self.world_size, stage)) for first in range(stage)]

    def holder_groups(self, modality_ranks: Iterable[int]) -> list[list[int]]:
        """Every data-parallel group without the modality ranks that are not named."""
        chosen = set(modality_ranks)
        return [
            [rank for rank in group if self.modality_rank(rank) in chosen]
            for group in self.data_groups()
        ]

    def expert_groups(self, modality_ranks: Iterable[int], size: int) -> list[list[int]]:
        """Runs of ``size`` holders of a tower, which hold its experts together."""
        return [
            holders[first : first + size]
            for holders in self.holder_groups(modality_ranks)
            for first in range(0, len(holders), size)
        ]

    def expert_data_groups(self, modality_ranks: Iterable[int], size: int) -> list[list[int]]:
        """Holders of a tower that hold the same of its experts."""
        return [
            holders[position::size]
            for holders in self.holder_groups(modality_ranks)
            for position in range(size)
        ]

    def tensor_expert_groups(self, modality_ranks: Iterable[int], size: int) -> list[list[int]]:
        """The expert groups of all ranks of a tensor-parallel group in one, that rank fastest."""
        return [
            [rank + tensor for rank in group for tensor in range(self.tensor)]
            for group in self.expert_groups(modality_ranks, size)
            if self.tensor_rank(group[0]) == 0
        ]
