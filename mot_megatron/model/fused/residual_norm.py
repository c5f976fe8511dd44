"""RMSNorm together with the residual addition beside it, for both placements of norms.

Backward computes the root mean square again, so only the rows that were normalized are saved. Each
program sums the weight's gradient over its own rows, and one more sum adds the programs' sums.

Letters: n rows, h width, p programs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from mot_megatron.model.fused.launch import (
    MOST_PARTIAL_SUMS,
    Tiling,
    check_dtype,
    launch,
    place,
    with_contiguous_rows,
)

TILE_ELEMENTS = 2048
"""Elements of a tile of whole rows; a longer row is a tile of its own."""


def norm_then_add(
    update: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """Return residual + rms_norm(update): post-norm; rows are [n, h]."""
    return _ResidualNorm.apply(update, residual, weight, eps, False)


def add_then_norm(
    update: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return s = residual + update, and rms_norm(s): pre-norm; rows are [n, h]."""
    return _ResidualNorm.apply(update, residual, weight, eps, True)


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        update: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        norms_sum: bool,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        check_dtype(update)
        update, residual = with_contiguous_rows(update), with_contiguous_rows(residual)
        rows, size = update.shape
        output = update.new_empty(rows, size)
        total = update.new_empty(rows, size) if norms_sum else update
        tiling = Tiling.of(rows, size, TILE_ELEMENTS, whole_rows=True)
        inputs = (update, update.stride(0), residual, residual.stride(0), weight)
        launch(
            _forward,
            tiling.grid,
            *(*inputs, total, output, rows, size, eps),
            NORMS_SUM=norms_sum,
            **tiling.meta,
        )
        ctx.eps, ctx.norms_sum = eps, norms_sum
        ctx.save_for_backward(total, weight)
        return (total, output) if norms_sum else output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        normalized, weight = ctx.saved_tensors
        of_output = with_contiguous_rows(gradients[-1])
        # Post-norm: the gradient of the output is also that of the residual.
        of_total = with_contiguous_rows(gradients[0])
        rows, size = of_output.shape
        result = of_output.new_empty(rows, size)
        tiling = Tiling.of(rows, size, TILE_ELEMENTS, whole_rows=True)
        programs = min(tiling.grid[0], MOST_PARTIAL_SUMS)
        partial = torch.empty(programs, size, dtype=torch.float32, device=weight.device)
        inputs = (
            *(normalized, normalized.stride(0), weight),
            *(of_output, of_output.stride(0), of_total, of_total.stride(0)),
        )
        launch(
            _backward,
            (programs,),
            *(*inputs, result, partial, rows, size, ctx.eps),
            NORMS_SUM=ctx.norms_sum,
            **tiling.meta,
        )
        of_weight = partial.sum(0).to(weight.dtype)
        of_residual = result if ctx.norms_sum else gradients[0]
        return result, of_residual, of_weight, None, None


@triton.jit(do_not_specialize=["rows"])
def _forward(
    update,
    update_stride,
    residual,
    residual_stride,
    weight,
    total,
    output,
    rows,
    size,
    eps,
    NORMS_SUM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column = place(ROWS, BLOCK)
    inside = (row < rows) & (column < size)
    x = tl.load(update + row * update_stride + column, mask=inside, other=0.0).to(tl.float32)
    kept = tl.load(residual + row * residual_stride + column, mask=inside, other=0.0)
    kept = kept.to(tl.float32)
    scale = tl.load(weight + column, mask=column < size, other=0.0).to(tl.float32)
    if NORMS_SUM:
        # The norm reads the rounded sum, as it does without fusion and as backward will.
        rounded = (x + kept).to(total.dtype.element_ty)
        tl.store(total + row * size + column, rounded, mask=inside)
        x = rounded.to(tl.float32)
    result = x * tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / size + eps) * scale
    if not NORMS_SUM:
        result += kept
    tl.store(output + row * size + column, result.to(output.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _backward(
    normalized,
    normalized_stride,
    weight,
    of_output,
    of_output_stride,
    of_total,
    of_total_stride,
    result,
    partial,
    rows,
    size,
    eps,
    NORMS_SUM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.arange(0, BLOCK)[None, :]
    scale = tl.load(weight + column, mask=column < size, other=0.0).to(tl.float32)
    of_weight = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & (column < size)
        x = tl.load(normalized + row * normalized_stride + column, mask=inside, other=0.0)
        x = x.to(tl.float32)
        arrived = tl.load(of_output + row * of_output_stride + column, mask=inside, other=0.0)
        arrived = arrived.to(tl.float32)
        inverse = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / size + eps)
        unit = x * inverse
        scaled = arrived * scale
        # y = w x / r: d/dx = (w dy - u mean(w dy u)) / r with u = x / r
        mean = tl.sum(scaled * unit, axis=1, keep_dims=True) / size
        gradient = inverse * (scaled - unit * mean)
        if NORMS_SUM:
            other = tl.load(of_total + row * of_total_stride + column, mask=inside, other=0.0)
            gradient += other.to(tl.float32)
        tl.store(result + row * size + column, gradient.to(result.dtype.element_ty), mask=inside)
        of_weight += arrived * unit
    sums = tl.sum(of_weight, axis=0, keep_dims=True)
    tl.store(partial + tl.program_id(0) * size + column, sums, mask=column < size)
