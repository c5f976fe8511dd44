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

from mot_megatron.model.fused.launch import check_dtype, with_contiguous_rows
from mot_megatron.model.grouping import Grouping

LARGEST_BLOCK = 4096


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
        if output.numel():
            block = min(triton.next_power_of_2(size), LARGEST_BLOCK)
            with torch.cuda.device_of(rows):
                _forward[(slots, triton.cdiv(size, block))](
                    rows, rows.stride(0), grouping.positions, output, size, BLOCK=block
                )
        return output.split(grouping.slots)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, ctx.grouping.scatter(gradients)


@triton.jit
def _forward(rows, row_stride, positions, output, size, BLOCK: tl.constexpr):  # noqa: N803
    slot = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    position = tl.load(positions + slot)
    filled = tl.where(position >= 0, size, 0)  # a padding slot has no position
    row = tl.load(rows + position * row_stride + column, mask=column < filled, other=0.0)
    tl.store(output + slot * size + column, row, mask=column < size)
