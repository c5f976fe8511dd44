"""Residual addition with RMSNorm, in Triton's interpreter, equals plain PyTorch."""

from __future__ import annotations

import pytest
import torch

from mot_megatron.model.fused import residual_norm
from mot_megatron.model.operations import PLAIN
from tests.model.fused.comparisons import assert_equal_operations, assert_near, random_rows

SHAPES = [(0, 8), (1, 1), (5, 40), (3, 130), (9, 33)]
EPS = 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["norm_then_add", "add_then_norm"])
@pytest.mark.parametrize(("rows", "size"), SHAPES)
def test_equals_plain_pytorch(
    rows: int, size: int, name: str, padded: bool, dtype: torch.dtype
) -> None:
    update, residual = (
        random_rows(rows, size, seed=seed, dtype=dtype, padded=padded) for seed in (1, 2)
    )
    with torch.no_grad():  # eighths, whose sums are exact in both dtypes
        update.mul_(8).round_().div_(8)
        residual.mul_(8).round_().div_(8)
    weight = random_rows(size, seed=3, dtype=dtype)
    fused, plain = getattr(residual_norm, name), getattr(PLAIN, name)
    inputs = [update, residual, weight]
    assert_equal_operations(lambda *x: fused(*x, EPS), lambda *x: plain(*x, EPS), inputs)


def test_weight_gradient_sums_the_rows_of_all_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    # 11 rows of 6 elements in tiles of 2 rows: 6 tiles, 2 per program.
    monkeypatch.setattr(residual_norm, "MOST_PARTIAL_SUMS", 3)
    monkeypatch.setattr(residual_norm, "TILE_ELEMENTS", 16)
    inputs = [random_rows(11, 6, seed=1), random_rows(11, 6, seed=2), random_rows(6, seed=3)]
    for name in ("norm_then_add", "add_then_norm"):
        fused, plain = getattr(residual_norm, name), getattr(PLAIN, name)
        assert_equal_operations(
            lambda *x, f=fused: f(*x, EPS), lambda *x, p=plain: p(*x, EPS), inputs
        )
        for tensor in inputs:
            tensor.grad = None


def test_gradients_are_reproducible() -> None:
    weight = random_rows(16, seed=3)
    gradients = []
    for _ in range(2):
        weight.grad = None
        output = residual_norm.norm_then_add(
            random_rows(40, 16, seed=1), random_rows(40, 16, seed=2), weight, EPS
        )
        output.square().sum().backward()
        assert weight.grad is not None
        gradients.append(weight.grad.clone())
    assert torch.equal(*gradients)


def test_without_rows_the_weight_has_a_zero_gradient() -> None:
    weight = random_rows(16, seed=3)
    empty = torch.zeros(0, 16, requires_grad=True)
    total, output = residual_norm.add_then_norm(empty, empty, weight, EPS)
    (total.sum() + output.sum()).backward()
    assert weight.grad is not None
    assert_near(weight.grad, torch.zeros(16), 0.0)
