"""Modality parallelism around attention: send q, k and v to the attending rank, and return.

Each direction takes one all-to-all over the modality group, in forward and in backward; no other
data of a layer crosses the group. A rank's stream holds the rows of its own towers, for all
sequences of the group. Attention runs either on this rank's sequences with all heads ("sequence"),
or on all sequences of the group with this rank's slice of the heads ("heads", as in
DeepSpeed-Ulysses, but with tokens sharded by modality instead of by position). All sizes are Python
ints that come with the batch.

Letters: P ranks of the group, a attended positions, g_k slots of tower k, H query heads and G
key-value heads of this tensor-parallel rank (H', G' those it attends with), d head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist

from mot_megatron.model.micro_batch import ExchangePlan, MicroBatch


@dataclass(frozen=True)
class HeadSlices:
    """The heads that each of the P ranks attends with."""

    queries: tuple[slice, ...]
    keys: tuple[slice, ...]

    @property
    def are_split(self) -> bool:
        """Whether the ranks attend with different heads."""
        return self.queries[0] != self.queries[-1]

    @classmethod
    def of(
        cls,
        exchange: Literal["sequence", "heads"],
        num_heads: int,
        num_groups: int,
        num_ranks: int,
    ) -> HeadSlices:
        """Return the slices of an exchange: "heads" splits the heads, "sequence" does not."""
        make = cls.split if exchange == "heads" else cls.whole
        return make(num_heads, num_groups, num_ranks)

    @classmethod
    def whole(cls, num_heads: int, num_groups: int, num_ranks: int) -> HeadSlices:
        """Give every rank all heads; it attends for its own sequences."""
        return cls((slice(0, num_heads),) * num_ranks, (slice(0, num_groups),) * num_ranks)

    @classmethod
    def split(cls, num_heads: int, num_groups: int, num_ranks: int) -> HeadSlices:
        """Split the query heads over the ranks; a key-value head goes to all ranks that need it.

        ``num_ranks`` must divide ``num_heads``, and ``num_ranks`` must divide ``num_groups`` or the
        other way round.
        """
        heads, groups = num_heads // num_ranks, max(num_groups // num_ranks, 1)
        first = [rank * num_groups // num_ranks for rank in range(num_ranks)]
        return cls(
            tuple(slice(rank * heads, (rank + 1) * heads) for rank in range(num_ranks)),
            tuple(slice(begin, begin + groups) for begin in first),
        )


@dataclass(frozen=True)
class _RowRange:
    """Rows of a tower that are contiguous both in its slice and in the exchange buffer."""

    tower: int
    """Index of the tower's slice in this rank's stream."""
    rows: slice
    buffer_rows: slice
    rank: int
    """Rank of the group that attends for them; the first one if several have the same heads."""


@dataclass(frozen=True)
class ModalityExchange:
    """The exchange of one micro-batch, as one rank performs it."""

    plan: ExchangePlan
    heads: HeadSlices
    slots: tuple[int, ...]
    """g_k of each tower that this rank holds, in the order of its stream."""
    tokens: tuple[int, ...]
    """Slots of each tower that hold tokens; padding slots follow them."""
    runs: tuple[_RowRange, ...]
    group: dist.ProcessGroup

    @classmethod
    def of(
        cls,
        heads: HeadSlices,
        towers: Sequence[int],
        micro_batch: MicroBatch,
        group: dist.ProcessGroup,
    ) -> ModalityExchange:
        """Build the exchange of a micro-batch for a rank that holds ``towers``."""
        plan = micro_batch.exchange
        assert plan is not None, "the micro-batch was not built for modality parallelism"
        return cls(
            plan=plan,
            heads=heads,
            slots=tuple(micro_batch.tower_slots[tower] for tower in towers),
            tokens=tuple(micro_batch.tower_tokens[tower] for tower in towers),
            runs=_runs(plan, heads, towers),
            group=group,
        )

    @property
    def send_sizes(self) -> list[int]:
        """Rows that this rank sends to each rank of the group."""
        return [sum(rows) for rows in zip(*self.plan.send_rows, strict=True)]

    def to_attention(
        self,
        queries: Sequence[torch.Tensor],
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Send rows in grouped order to the attending ranks; receive positions in sequence order.

        Collectives: one all-to-all over the modality group in forward, one in backward.

        Args:
            queries: Per tower held, [g_k, H, d].
            keys: Per tower held, [g_k, G, d].
            values: Same shapes as ``keys``.

        Returns:
            q [a, H', d], k [a, G', d] and v [a, G', d].
        """
        return _ToAttention.apply(self, *queries, *keys, *values)

    def from_attention(self, output: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return attention's output [a, H', d] to grouped order: per tower held, [g_k, H * d].

        Padding slots become zero rows. Collectives: one all-to-all over the modality group in
        forward, one in backward.
        """
        return _FromAttention.apply(self, output)

    def send(self, buffer: torch.Tensor) -> torch.Tensor:
        """Exchange [rows for each rank, ...] for [rows received from each rank, ...]."""
        received = buffer.new_empty(sum(self.plan.receive_rows), *buffer.shape[1:])
        dist.all_to_all_single(
            received, buffer, list(self.plan.receive_rows), self.send_sizes, group=self.group
        )
        return received

    def send_back(self, buffer: torch.Tensor) -> torch.Tensor:
        """The inverse of ``send``."""
        received = buffer.new_empty(sum(self.send_sizes), *buffer.shape[1:])
        dist.all_to_all_single(
            received, buffer, self.send_sizes, list(self.plan.receive_rows), group=self.group
        )
        return received

    def unpack(
        self, buffer: torch.Tensor, chosen: Sequence[slice], num_heads: int
    ) -> tuple[torch.Tensor, ...]:
        """Unpack [rows for each rank, H', d] into per tower held, [g_k, num_heads, d].

        Sum what returns for a key-value head that was sent to several ranks.
        """
        summed = self.heads.are_split and chosen[0] == chosen[1]
        slices = []
        for slots, tokens in zip(self.slots, self.tokens, strict=True):
            part = buffer.new_empty(slots, num_heads, buffer.shape[-1])
            part[0 if summed else tokens :].zero_()
            slices.append(part)
        for run in self.runs:
            target = slices[run.tower][run.rows, chosen[run.rank]]
            if summed:
                target += buffer[run.buffer_rows]
            else:
                target.copy_(buffer[run.buffer_rows])
        return tuple(slices)

    def pack(
        self, buffer: torch.Tensor, slices: Sequence[torch.Tensor], chosen: Sequence[slice]
    ) -> None:
        """Fill the buffer [rows for each rank, H', d] from the towers' slices."""
        for run in self.runs:
            buffer[run.buffer_rows] = slices[run.tower][run.rows, chosen[run.rank]]


def _runs(plan: ExchangePlan, heads: HeadSlices, towers: Sequence[int]) -> tuple[_RowRange, ...]:
    """List the row ranges for each rank, tower by tower, merging contiguous ones."""
    runs: list[_RowRange] = []
    sent = [0] * len(towers)  # rows of each tower that went to earlier ranks
    split_by_heads = heads.are_split
    end = 0
    for rank in range(len(plan.receive_rows)):
        for place, tower in enumerate(towers):
            count = plan.send_rows[tower][rank]
            begin = 0 if split_by_heads else sent[place]
            run = _RowRange(place, slice(begin, begin + count), slice(end, end + count), rank)
            sent[place], end = begin + count, end + count
            last = runs[-1] if runs else None
            if last and not split_by_heads and last.tower == place:
                # This rank holds one tower: its rows for successive ranks are contiguous.
                runs[-1] = _RowRange(
                    place,
                    slice(last.rows.start, run.rows.stop),
                    slice(last.buffer_rows.start, run.buffer_rows.stop),
                    last.rank,
                )
            else:
                runs.append(run)
    return tuple(runs)


class _ToAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, exchange: ModalityExchange, *parts: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        held = len(exchange.slots)
        queries, keys, values = parts[:held], parts[held : 2 * held], parts[2 * held :]
        ctx.exchange, ctx.num_heads, ctx.num_groups = (
            exchange,
            queries[0].shape[1],
            keys[0].shape[1],
        )
        heads = exchange.heads
        width = _width(heads.queries), _width(heads.keys), _width(heads.keys)
        buffer = queries[0].new_empty(sum(exchange.send_sizes), sum(width), queries[0].shape[-1])
        for target, slices, chosen in zip(
            buffer.split(width, dim=1),
            (queries, keys, values),
            (heads.queries, heads.keys, heads.keys),
            strict=True,
        ):
            exchange.pack(target, slices, chosen)
        received = exchange.send(buffer)
        rows = received.index_select(0, exchange.plan.position_index)
        return rows.split(width, dim=1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        exchange: ModalityExchange = ctx.exchange
        rows = torch.cat(gradients, dim=1).index_select(0, exchange.plan.arrival_index)
        buffer = exchange.send_back(rows)
        heads = exchange.heads
        width = _width(heads.queries), _width(heads.keys), _width(heads.keys)
        results: list[torch.Tensor] = []
        for source, chosen, num_heads in zip(
            buffer.split(width, dim=1),
            (heads.queries, heads.keys, heads.keys),
            (ctx.num_heads, ctx.num_groups, ctx.num_groups),
            strict=True,
        ):
            results += exchange.unpack(source, chosen, num_heads)
        return None, *results


class _FromAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, exchange: ModalityExchange, output: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.exchange = exchange
        buffer = exchange.send_back(output.index_select(0, exchange.plan.arrival_index))
        heads = exchange.heads.queries
        slices = exchange.unpack(buffer, heads, _total(heads))
        return tuple(part.flatten(1) for part in slices)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, torch.Tensor]:
        exchange: ModalityExchange = ctx.exchange
        heads = exchange.heads.queries
        slices = [gradient.unflatten(1, (_total(heads), -1)) for gradient in gradients]
        buffer = slices[0].new_empty(sum(exchange.send_sizes), _width(heads), slices[0].shape[-1])
        exchange.pack(buffer, slices, heads)
        return None, exchange.send(buffer).index_select(0, exchange.plan.position_index)


def _width(chosen: Sequence[slice]) -> int:
    """Number of heads that a rank attends with; equal on all ranks."""
    return chosen[0].stop - chosen[0].start


def _total(chosen: Sequence[slice]) -> int:
    """Number of heads over all ranks."""
    return max(part.stop for part in chosen)
