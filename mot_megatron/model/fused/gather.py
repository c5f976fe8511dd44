"""From sequence order to the towers: one pass copies every row and fills padding slots with zeros.

The slices of all towers are views of one tensor. Backward writes the gradients' rows back, with one
copy by index per tower.

Letters: t tokens, c columns, g slots of all towers, g_k slots of tower k.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from mot_megatron.model.fused.launch import (
    Tiling,
    check_dtype,
    launch,
    place,
    with_contiguous_rows,
)
from mot_megatron.model.grouping import Grouping

TILE_ELEMENTS = 2048


def gathered(grouping: Grouping, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Move ``rows`` [t, c] from sequence order to K slices [g_k, c]; see ``Grouping.to_towers``."""
    return (rows,) if grouping.is_identity else _Gathered.apply(grouping, rows)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grouping: Grouping, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        check_dtype(rows)
        rows = with_contiguous_rows(rows)
        ctx.grouping = grouping
        size, slots = rows.shape[1], sum(grouping.slots)
        output = rows.new_empty(slots, size)
        tiling = Tiling.of(slots, size, TILE_ELEMENTS)
        arguments = (rows, rows.stride(0), grouping.positions, output, slots, size)
        launch(_forward, tiling.grid, *arguments, **tiling.meta)
        return output.split(grouping.slots)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, ctx.grouping.scatter(gradients)


@triton.jit(do_not_specialize=["slots"])
def _forward(
    rows,
    row_stride,
    positions,
    output,
    slots,
    size,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    slot, column = place(ROWS, BLOCK)
    inside = (slot < slots) & (column < size)
    position = tl.load(positions + slot, mask=slot < slots, other=-1)
    source = rows + position * row_stride + column
    # A padding slot has no position.
    row = tl.load(source, mask=inside & (position >= 0), other=0.0)
    tl.store(output + slot * size + column, row, mask=inside)
