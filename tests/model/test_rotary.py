"""Rotary embedding equals complex multiplication and encodes relative positions."""

from __future__ import annotations

import pytest
import torch

from mot_megatron.model.rotary import RotaryAngles
from tests.model.algorithm_one import rotate


def angles(positions: torch.Tensor, dtype: torch.dtype = torch.float64) -> RotaryAngles:
    return RotaryAngles.of(positions, head_dim=16, base=10000.0, dtype=dtype)


def test_equals_complex_rotation() -> None:
    x = torch.randn(9, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([0, 1, 2, 3, 0, 1, 0, 4000, 7])
    expected = torch.stack([rotate(x[:, head], positions, 10000.0) for head in range(3)], dim=1)
    torch.testing.assert_close(angles(positions).rotate(x), expected, rtol=1e-10, atol=1e-10)


def test_query_key_products_depend_only_on_the_distance() -> None:
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 1, 1, 16, dtype=torch.float64, generator=generator)
    products = [
        (angles(torch.tensor([p + 5])).rotate(q) * angles(torch.tensor([p])).rotate(k)).sum()
        for p in (0, 3, 100, 4090)
    ]
    for product in products:
        torch.testing.assert_close(product, products[0], rtol=1e-9, atol=1e-9)


def test_rotation_at_position_zero_is_the_identity() -> None:
    x = torch.randn(2, 4, 16, dtype=torch.float64)
    assert torch.equal(angles(torch.tensor([0, 0])).rotate(x), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_angles_are_computed_in_fp32(dtype: torch.dtype) -> None:
    positions = torch.tensor([4095])
    exact = angles(positions)
    rounded = angles(positions, dtype)
    assert rounded.cosine.dtype == dtype
    # fp32 resolves 4095 radians to 2.4e-4; rounding a cosine to bf16 adds at most 2^-9.
    torch.testing.assert_close(rounded.cosine.double(), exact.cosine, rtol=0, atol=2**-8)
