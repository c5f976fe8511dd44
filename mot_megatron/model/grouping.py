"""Move rows between grouped order, in which towers work, and sequence order, for attention.

The residual stream is a tuple of K tensors, one contiguous slice per tower, so a tower's matrix
multiplication needs no mask, gather or copy. Only attention needs sequence order: one pass moves q,
k and v there, and one moves the output back. Each of the two autograd functions is the backward of
the other, and every size is a Python int known before the step.

Letters: t tokens of the micro-batch, t_k tokens and g_k >= t_k slots of tower k, c columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from mot_megatron.model.micro_batch import MicroBatch


@dataclass(frozen=True)
class Grouping:
    """The sequence positions of each tower's tokens, in the order of the tower's slots."""

    indices: tuple[torch.Tensor, ...]
    """K tensors [t_k] int64: sequence positions of tower k's tokens."""
    slots: tuple[int, ...]
    """g_k: rows of tower k's slice; rows after the first t_k are padding."""

    @classmethod
    def of(cls, micro_batch: MicroBatch) -> Grouping:
        """Build the grouping of a micro-batch, on the batch's device."""
        starts = micro_batch.group_index.split(micro_batch.tower_slots)
        indices = tuple(
            index[:tokens] for index, tokens in zip(starts, micro_batch.tower_tokens, strict=True)
        )
        return cls(indices, micro_batch.tower_slots)

    def to_attention(
        self,
        queries: Sequence[torch.Tensor],
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Move K slices [g_k, heads, d] of each to q, k and v [t, heads, d] in sequence order."""
        return self.to_sequence(queries), self.to_sequence(keys), self.to_sequence(values)

    def from_attention(self, output: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Move [t, heads, d] from sequence order to K slices [g_k, heads * d]."""
        return self.to_towers(output.flatten(1))

    @property
    def is_identity(self) -> bool:
        """Whether the two orders coincide, as with one tower without padding."""
        return len(self.slots) == 1 and self.slots[0] == self.indices[0].numel()

    @cached_property
    def positions(self) -> torch.Tensor:
        """[g] int64: sequence position of every slot's token; -1 for padding slots."""
        parts = []
        for index, slots in zip(self.indices, self.slots, strict=True):
            parts += [index, index.new_full((slots - index.numel(),), -1)]
        return torch.cat(parts)

    def to_sequence(self, slices: Sequence[torch.Tensor]) -> torch.Tensor:
        """Move K slices [g_k, ...] to [t, ...] in sequence order, dropping padding slots."""
        if self.is_identity:
            return slices[0]
        return _ToSequence.apply(self, *slices)

    def to_towers(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Move [t, ...] from sequence order to K slices [g_k, ...]; padding slots become zeros."""
        if self.is_identity:
            return (rows,)
        return _ToTowers.apply(self, rows)

    def scatter(self, slices: Sequence[torch.Tensor]) -> torch.Tensor:
        """Write K slices [g_k, ...] to [t, ...], without recording it for backward."""
        num_tokens = sum(index.numel() for index in self.indices)
        rows = slices[0].new_empty(num_tokens, *slices[0].shape[1:])
        for index, part in zip(self.indices, slices, strict=True):
            rows.index_copy_(0, index, part[: index.numel()])
        return rows


class _ToSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grouping: Grouping, *slices: torch.Tensor) -> torch.Tensor:
        ctx.grouping = grouping
        return grouping.scatter(slices)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (None, *_gather(ctx.grouping, gradients[0]))


class _ToTowers(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grouping: Grouping, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.grouping = grouping
        return _gather(grouping, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, ctx.grouping.scatter(gradients)


def _gather(grouping: Grouping, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    slices = []
    for index, slots in zip(grouping.indices, grouping.slots, strict=True):
        if slots == index.numel():
            slices.append(rows.index_select(0, index))
        else:
            part = rows.new_zeros(slots, *rows.shape[1:])
            torch.index_select(rows, 0, index, out=part[: index.numel()])
            slices.append(part)
    return tuple(slices)


def rank_major(values: torch.Tensor, slots: Sequence[int], num_ranks: int) -> torch.Tensor:
    """Reorder [g, ...] from tower-major order to the order that a sequence-parallel gather yields.

    Rank r's local stream is the r-th part of every tower's slice. Gathering the local streams puts
    rank 0's parts of all towers first, then rank 1's. With one rank this is the identity.
    """
    if num_ranks == 1 or not values.numel():
        return values
    parts = [part.chunk(num_ranks) for part in values.split(tuple(slots)) if part.numel()]
    return torch.cat([tower[rank] for rank in range(num_ranks) for tower in parts])
