"""QK-norm, RoPE and scatter in one kernel equal plain PyTorch, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from mot_megatron.model.fused import qkv
from mot_megatron.model.grouping import Grouping
from mot_megatron.model.heads import HeadNorms, ProjectedHeads
from mot_megatron.model.operations import RotatedHeads, rotated_heads
from mot_megatron.model.rotary import RotaryAngles
from tests.model.fused.comparisons import assert_equal_operations, random_rows

HEADS = {
    "d=16": ProjectedHeads(2, 1, 16),
    "grouped queries, odd numbers": ProjectedHeads(3, 5, 24),
    "one key-value head": ProjectedHeads(1, 3, 6),
    "d=128": ProjectedHeads(1, 2, 128),
}
TOKENS = {
    "one tower": ((7,), (7,)),
    "an absent tower, padding": ((5, 0, 3), (6, 0, 6)),
    "only padding in a tower": ((4, 0), (4, 2)),
    "no tokens": ((0, 0), (0, 0)),
}
EPS = 1e-5


def random_grouping(tokens: tuple[int, ...], slots: tuple[int, ...]) -> Grouping:
    order = torch.randperm(sum(tokens), generator=torch.Generator().manual_seed(0))
    return Grouping(tuple(part.sort().values for part in order.split(tokens)), slots)


def check(
    heads: ProjectedHeads,
    grouping: Grouping,
    dtype: torch.dtype,
    *,
    normed: bool = True,
    padded: bool = False,
) -> None:
    """Compare kernel and plain PyTorch; in bf16 both use the same rounded angles."""
    towers, tokens = len(grouping.slots), sum(len(index) for index in grouping.indices)
    positions = torch.arange(tokens)
    angles = RotaryAngles.of(positions, heads.head_dim, 100.0, dtype)
    wide_angles = RotaryAngles(angles.cosine.float(), angles.sine.float())
    columns = heads.groups * heads.units_per_group * heads.head_dim
    projections = [
        random_rows(slots, columns, seed=tower, dtype=dtype, padded=padded)
        for tower, slots in enumerate(grouping.slots)
    ]
    weights = [random_rows(heads.head_dim, seed=9 + i, dtype=dtype) for i in range(2 * towers)]

    def run(
        operation: RotatedHeads, rotary: RotaryAngles, tensors: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...]:
        rows, own = tensors[:towers], tensors[towers:]
        norms = HeadNorms(own[:towers], own[towers:], EPS) if normed else None
        return operation(rows, heads, norms, grouping, rotary)

    assert_equal_operations(
        lambda *tensors: run(qkv.rotated_heads, angles, tensors),
        lambda *tensors: run(rotated_heads, wide_angles, tensors),
        [*projections, *(weights if normed else [])],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_equals_plain_pytorch(
    heads: ProjectedHeads, tokens: tuple[tuple[int, ...], tuple[int, ...]], dtype: torch.dtype
) -> None:
    check(heads, random_grouping(*tokens), dtype)


@pytest.mark.parametrize("padded", [False, True])
def test_without_norms_and_with_rows_apart(padded: bool) -> None:
    for normed in (False, True):
        grouping = random_grouping((5, 2), (6, 2))
        check(HEADS["d=16"], grouping, torch.float32, normed=normed, padded=padded)


def test_weight_gradients_sum_all_blocks_of_all_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qkv, "MOST_PARTIAL_SUMS", 2)
    monkeypatch.setattr(qkv, "BLOCK_ELEMENTS", 64)
    # 4 units per block and 3 units per group: blocks cross rows and groups.
    check(HEADS["d=16"], random_grouping((9, 4), (9, 5)), torch.float32)


def test_gradients_may_have_any_strides() -> None:
    heads, grouping = HEADS["grouped queries, odd numbers"], random_grouping((5, 2), (6, 2))
    angles = RotaryAngles.of(torch.arange(7), heads.head_dim, 100.0, torch.float32)
    columns = heads.groups * heads.units_per_group * heads.head_dim
    projections = [random_rows(slots, columns, seed=slots) for slots in grouping.slots]
    results = []
    for operation in (qkv.rotated_heads, rotated_heads):
        q, k, v = operation(projections, heads, None, grouping, angles)
        # Attention reads heads first, and so writes their gradients; a sum expands its gradient.
        by_head = q.transpose(0, 1) * torch.arange(15.0)[:, None, None]
        (by_head.contiguous().square().sum() + k.sum() + 2 * v.sum()).backward()
        results.append([rows.grad for rows in projections])
        for rows in projections:
            rows.grad = None
    torch.testing.assert_close(*results)
