"""Arithmetic of the parallel axes, without any process group.

Ranks are numbered with tensor parallelism fastest (Megatron's order), so that the ranks that talk
most sit on one node.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mesh:
    """Sizes of the axes of a job."""

    world_size: int
    tensor: int

    @property
    def data(self) -> int:
        """Size of data parallelism: what the other axes leave."""
        return self.world_size // self.tensor

    def tensor_rank(self, rank: int) -> int:
        """Position of a global rank in its tensor-parallel group."""
        return rank % self.tensor

    def data_rank(self, rank: int) -> int:
        """Position of a global rank in its data-parallel group."""
        return rank // self.tensor

    def tensor_groups(self) -> list[list[int]]:
        """Global ranks of every tensor-parallel group."""
        return [
            list(range(first, first + self.tensor))
            for first in range(0, self.world_size, self.tensor)
        ]

    def data_groups(self) -> list[list[int]]:
        """Global ranks of every data-parallel group."""
        return [list(range(first, self.world_size, self.tensor)) for first in range(self.tensor)]
