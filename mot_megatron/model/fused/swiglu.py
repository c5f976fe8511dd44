"""SwiGLU in one pass: silu(gate) * up, of rows that hold gate and up side by side.

Backward computes silu again, so only the input is saved.

Letters: n rows, f feed-forward width.
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

TILE_ELEMENTS = 1024


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up, [n, f], of ``gate_up`` [n, 2 f]: f columns of gate, then f of up."""
    return _SwiGLU.apply(gate_up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
        check_dtype(gate_up)
        gate_up = with_contiguous_rows(gate_up)
        ctx.save_for_backward(gate_up)
        rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        output = gate_up.new_empty(rows, size)
        tiling = Tiling.of(rows, size, TILE_ELEMENTS)
        arguments = (gate_up, gate_up.stride(0), output, rows, size)
        launch(_forward, tiling.grid, *arguments, **tiling.meta)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        (gate_up,) = ctx.saved_tensors
        gradient = with_contiguous_rows(gradients[0])
        rows, size = gradient.shape
        result = gate_up.new_empty(rows, 2 * size)
        tiling = Tiling.of(rows, size, TILE_ELEMENTS)
        inputs = (gate_up, gate_up.stride(0), gradient, gradient.stride(0))
        launch(_backward, tiling.grid, *inputs, result, rows, size, **tiling.meta)
        return result


@triton.jit(do_not_specialize=["rows"])
def _forward(
    gate_up,
    row_stride,
    output,
    rows,
    size,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column = place(ROWS, BLOCK)
    inside = (row < rows) & (column < size)
    source = gate_up + row * row_stride + column
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + size, mask=inside, other=0.0).to(tl.float32)
    result = gate * tl.sigmoid(gate) * up
    tl.store(output + row * size + column, result.to(output.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _backward(
    gate_up,
    row_stride,
    gradient,
    gradient_stride,
    output,
    rows,
    size,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column = place(ROWS, BLOCK)
    inside = (row < rows) & (column < size)
    source = gate_up + row * row_stride + column
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + size, mask=inside, other=0.0).to(tl.float32)
    arrived = tl.load(gradient + row * gradient_stride + column, mask=inside, other=0.0)
    arrived = arrived.to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    # d silu(g) / d g = sigmoid(g) * (1 + g * (1 - sigmoid(g)))
    of_gate = arrived * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    of_up = arrived * gate * sigmoid
    target = output + row * 2 * size + column
    tl.store(target, of_gate.to(output.dtype.element_ty), mask=inside)
    tl.store(target + size, of_up.to(output.dtype.element_ty), mask=inside)
