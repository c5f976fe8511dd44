"""From the towers' projections to q, k and v in sequence order: QK-norm, RoPE and scatter at once.

A row of a tower's projection is divided into units of one head. A program reads a block of units,
normalizes and rotates those of queries and keys, and writes each to its row in sequence order. The
projection is read once and q, k and v are written once, per tower. Backward reads the projection
again, so nothing else is saved.

Letters: K towers, g_k slots and t_k tokens of tower k, t tokens, G key-value heads, w units of each
(its queries, its key, its value), d head size, p programs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from mot_megatron.model.fused.launch import (
    MOST_PARTIAL_SUMS,
    check_dtype,
    launch,
    warps_for,
    with_contiguous_rows,
)
from mot_megatron.model.grouping import Grouping
from mot_megatron.model.heads import HeadNorms, ProjectedHeads
from mot_megatron.model.rotary import RotaryAngles

BLOCK_ELEMENTS = 2048
"""Elements of a block of units, whose head size is padded to a power of two."""


def rotated_heads(
    projections: Sequence[torch.Tensor],
    heads: ProjectedHeads,
    norms: HeadNorms | None,
    grouping: Grouping,
    rotary: RotaryAngles,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return q [t, heads, d], k and v [t, G, d]; see ``LayerOperations.rotated_heads``."""
    weights = () if norms is None else (*norms.query_weights, *norms.key_weights)
    eps = 0.0 if norms is None else norms.eps
    return _RotatedHeads.apply(grouping, heads, rotary, eps, *projections, *weights)


class _RotatedHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        grouping: Grouping,
        heads: ProjectedHeads,
        rotary: RotaryAngles,
        eps: float,
        *tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        check_dtype(tensors[0])
        towers = len(grouping.slots)
        projections = [with_contiguous_rows(rows) for rows in tensors[:towers]]
        weights = tensors[towers:]
        tokens = sum(index.numel() for index in grouping.indices)
        counts = (heads.groups * heads.queries_per_group, heads.groups, heads.groups)
        q, k, v = (projections[0].new_empty(tokens, n, heads.head_dim) for n in counts)
        constants = _constants(heads, has_norm=bool(weights))
        for tower, (rows, index) in enumerate(zip(projections, grouping.indices, strict=True)):
            units = index.numel() * heads.groups * heads.units_per_group
            inputs = (rows, rows.stride(0), *_weights_of(tower, weights, rows))
            angles = (rotary.cosine, rotary.sine)
            grid = (triton.cdiv(units, constants["UNITS"]),)
            launch(_forward, grid, *inputs, *angles, index, q, k, v, units, eps, **constants)
        ctx.grouping, ctx.heads, ctx.rotary, ctx.eps = grouping, heads, rotary, eps
        ctx.save_for_backward(*projections, *weights)
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grouping, heads, rotary = ctx.grouping, ctx.heads, ctx.rotary
        towers = len(grouping.slots)
        projections, weights = ctx.saved_tensors[:towers], ctx.saved_tensors[towers:]
        arrived = [with_contiguous_rows(gradient) for gradient in gradients]
        strides = [stride for gradient in arrived for stride in gradient.stride()[:2]]
        constants = _constants(heads, has_norm=bool(weights))
        results: list[torch.Tensor] = []
        of_weights: list[torch.Tensor] = [torch.empty(0)] * len(weights)
        for tower, (rows, index) in enumerate(zip(projections, grouping.indices, strict=True)):
            result = torch.empty_like(rows, memory_format=torch.contiguous_format)
            units = rows.shape[0] * heads.groups * heads.units_per_group
            programs = min(triton.cdiv(units, constants["UNITS"]), MOST_PARTIAL_SUMS)
            partial = rows.new_empty(programs, 2, heads.head_dim, dtype=torch.float32)
            inputs = (
                *(rows, rows.stride(0), *_weights_of(tower, weights, rows)),
                *(rotary.cosine, rotary.sine, index, *arrived, *strides),
            )
            sizes = (units, index.numel(), ctx.eps)
            launch(_backward, (programs,), *inputs, result, partial, *sizes, **constants)
            results.append(result)
            if weights:
                sums = partial.sum(0).to(weights[0].dtype)
                of_weights[tower], of_weights[towers + tower] = sums.unbind(0)
        return None, None, None, None, *results, *of_weights


def _weights_of(
    tower: int, weights: Sequence[torch.Tensor], unused: torch.Tensor
) -> Sequence[torch.Tensor]:
    """Return the weights for a tower's queries and keys, from [all queries', all keys']."""
    return weights[tower :: len(weights) // 2] if weights else (unused, unused)


def _constants(heads: ProjectedHeads, has_norm: bool) -> dict[str, Any]:
    block = triton.next_power_of_2(heads.head_dim // 2)
    units = max(BLOCK_ELEMENTS // (2 * block), 1)
    return {
        "GROUPS": heads.groups,
        "QUERIES": heads.queries_per_group,
        "HALF": heads.head_dim // 2,
        "HAS_NORM": has_norm,
        "UNITS": units,
        "HALF_BLOCK": block,
        "num_warps": warps_for(units * block),
    }


@triton.jit
def _place(unit, GROUPS: tl.constexpr, QUERIES: tl.constexpr):
    """Return the row, the place in it, the key-value head and the place among its units."""
    row = unit // (GROUPS * (QUERIES + 2))
    place = unit % (GROUPS * (QUERIES + 2))
    return row, place, place // (QUERIES + 2), place % (QUERIES + 2)


@triton.jit
def _halves(source, column, inside, HALF: tl.constexpr):
    """Load both halves of every head in fp32."""
    first = tl.load(source + column, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + column + HALF, mask=inside, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _weights(of_queries, of_keys, is_query, column, HALF: tl.constexpr):
    """Load both halves of the norm weights of every unit."""
    inside = column < HALF
    query_1, query_2 = _halves(of_queries, column, inside, HALF)
    key_1, key_2 = _halves(of_keys, column, inside, HALF)
    return tl.where(is_query, query_1, key_1), tl.where(is_query, query_2, key_2)


@triton.jit
def _angles(cosine, sine, position, column, inside, HALF: tl.constexpr):
    """Load cosines and sines; both halves of a head have the same."""
    offset = position * 2 * HALF + column
    cos = tl.load(cosine + offset, mask=inside, other=1.0).to(tl.float32)
    sin = tl.load(sine + offset, mask=inside, other=0.0).to(tl.float32)
    return cos, sin


@triton.jit
def _store(target, column, first, second, inside, HALF: tl.constexpr):
    dtype = target.dtype.element_ty
    tl.store(target + column, first.to(dtype), mask=inside)
    tl.store(target + column + HALF, second.to(dtype), mask=inside)


@triton.jit(do_not_specialize=["units"])
def _forward(
    rows,
    row_stride,
    query_weight,
    key_weight,
    cosine,
    sine,
    index,
    q,
    k,
    v,
    units,
    eps,
    GROUPS: tl.constexpr,
    QUERIES: tl.constexpr,
    HALF: tl.constexpr,
    HAS_NORM: tl.constexpr,
    UNITS: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
):
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)[:, None]
    column = tl.arange(0, HALF_BLOCK)[None, :]
    inside = (unit < units) & (column < HALF)
    row, place, group, part = _place(unit, GROUPS, QUERIES)
    is_query, is_key, is_value = part < QUERIES, part == QUERIES, part > QUERIES
    source = rows + row.to(tl.int64) * row_stride + place * 2 * HALF
    first, second = _halves(source, column, inside, HALF)
    position = tl.load(index + row, mask=unit < units, other=0)
    if HAS_NORM:
        squares = tl.sum(first * first + second * second, axis=1, keep_dims=True)
        inverse = tl.rsqrt(squares / (2 * HALF) + eps)
        weight_1, weight_2 = _weights(query_weight, key_weight, is_query, column, HALF)
        first = tl.where(is_value, first, first * inverse * weight_1)
        second = tl.where(is_value, second, second * inverse * weight_2)
    cos, sin = _angles(cosine, sine, position, column, inside & ~is_value, HALF)
    turned_1, turned_2 = first * cos - second * sin, second * cos + first * sin
    # Three masked stores, because Triton cannot vectorize one whose pointers differ per unit.
    query = q + ((position * GROUPS + group) * QUERIES + part) * 2 * HALF
    shared = (position * GROUPS + group) * 2 * HALF
    _store(query, column, turned_1, turned_2, inside & is_query, HALF)
    _store(k + shared, column, turned_1, turned_2, inside & is_key, HALF)
    _store(v + shared, column, turned_1, turned_2, inside & is_value, HALF)


@triton.jit(do_not_specialize=["units", "tokens"])
def _backward(
    rows,
    row_stride,
    query_weight,
    key_weight,
    cosine,
    sine,
    index,
    of_q,
    of_k,
    of_v,
    q_row_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    result,
    partial,
    units,
    tokens,
    eps,
    GROUPS: tl.constexpr,
    QUERIES: tl.constexpr,
    HALF: tl.constexpr,
    HAS_NORM: tl.constexpr,
    UNITS: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
):
    column = tl.arange(0, HALF_BLOCK)[None, :]
    query_sum_1 = tl.zeros((HALF_BLOCK,), dtype=tl.float32)
    query_sum_2 = tl.zeros((HALF_BLOCK,), dtype=tl.float32)
    key_sum_1 = tl.zeros((HALF_BLOCK,), dtype=tl.float32)
    key_sum_2 = tl.zeros((HALF_BLOCK,), dtype=tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(units, UNITS), tl.num_programs(0)):
        unit = block * UNITS + tl.arange(0, UNITS)[:, None]
        row, place, group, part = _place(unit, GROUPS, QUERIES)
        is_query, is_key, is_value = part < QUERIES, part == QUERIES, part > QUERIES
        # Padding slots are the rows behind the tokens: their gradient is zero.
        inside = (unit < units) & (row < tokens) & (column < HALF)
        position = tl.load(index + row, mask=row < tokens, other=0)
        query = of_q + position * q_row_stride + (group * QUERIES + part) * q_head_stride
        key = of_k + position * k_row_stride + group * k_head_stride
        value = of_v + position * v_row_stride + group * v_head_stride
        query_1, query_2 = _halves(query, column, inside & is_query, HALF)
        key_1, key_2 = _halves(key, column, inside & is_key, HALF)
        value_1, value_2 = _halves(value, column, inside & is_value, HALF)
        arrived_1, arrived_2 = query_1 + key_1 + value_1, query_2 + key_2 + value_2
        cos, sin = _angles(cosine, sine, position, column, inside & ~is_value, HALF)
        first, second = arrived_1 * cos + arrived_2 * sin, arrived_2 * cos - arrived_1 * sin
        if HAS_NORM:
            source = rows + row.to(tl.int64) * row_stride + place * 2 * HALF
            x_1, x_2 = _halves(source, column, inside & ~is_value, HALF)
            squares = tl.sum(x_1 * x_1 + x_2 * x_2, axis=1, keep_dims=True)
            inverse = tl.rsqrt(squares / (2 * HALF) + eps)
            x_1, x_2 = x_1 * inverse, x_2 * inverse
            query_sum_1 += tl.sum(tl.where(is_query, first * x_1, 0.0), axis=0)
            query_sum_2 += tl.sum(tl.where(is_query, second * x_2, 0.0), axis=0)
            key_sum_1 += tl.sum(tl.where(is_key, first * x_1, 0.0), axis=0)
            key_sum_2 += tl.sum(tl.where(is_key, second * x_2, 0.0), axis=0)
            weight_1, weight_2 = _weights(query_weight, key_weight, is_query, column, HALF)
            scaled_1, scaled_2 = first * weight_1, second * weight_2
            # y = w x / r: d/dx = (w dy - u mean(w dy u)) / r with u = x / r
            mean = tl.sum(scaled_1 * x_1 + scaled_2 * x_2, axis=1, keep_dims=True) / (2 * HALF)
            first = tl.where(is_value, first, inverse * (scaled_1 - x_1 * mean))
            second = tl.where(is_value, second, inverse * (scaled_2 - x_2 * mean))
        target = result + unit.to(tl.int64) * 2 * HALF
        _store(target, column, first, second, (unit < units) & (column < HALF), HALF)
    if HAS_NORM:
        column_1 = tl.arange(0, HALF_BLOCK)
        sums = partial + tl.program_id(0) * 4 * HALF
        inside_1 = column_1 < HALF
        _store(sums, column_1, query_sum_1, query_sum_2, inside_1, HALF)
        _store(sums + 2 * HALF, column_1, key_sum_1, key_sum_2, inside_1, HALF)
