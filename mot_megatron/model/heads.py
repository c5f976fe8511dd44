"""How a row of the q, k and v projection is divided into heads.

Rows are ordered by key-value group (its queries, its key, its value), so any tensor-parallel size
that divides the number of groups splits the projection between groups.

Letters: n rows, G key-value heads of this tensor-parallel rank, d head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ProjectedHeads:
    """The heads of a projection on this tensor-parallel rank."""

    groups: int
    """G."""
    queries_per_group: int
    head_dim: int
    """d."""

    @property
    def units_per_group(self) -> int:
        """Heads of a group: its queries, its key and its value."""
        return self.queries_per_group + 2

    def split(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Split [n, G * (queries + 2) * d] into q [n, G, queries, d], k and v [n, G, 1, d]."""
        by_group = rows.view(rows.shape[0], self.groups, self.units_per_group, self.head_dim)
        return by_group.split((self.queries_per_group, 1, 1), dim=2)


@dataclass(frozen=True)
class HeadNorms:
    """Weights of the RMSNorms of queries and keys, [d] per tower, as this rank must use them."""

    query_weights: tuple[torch.Tensor, ...]
    key_weights: tuple[torch.Tensor, ...]
    eps: float
