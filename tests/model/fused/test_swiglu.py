"""SwiGLU in Triton's interpreter equals plain PyTorch."""

from __future__ import annotations

import pytest
import torch

from mot_megatron.model.fused.swiglu import swiglu
from mot_megatron.model.operations import PLAIN
from tests.model.fused.comparisons import assert_equal_operations, random_rows

SHAPES = [(0, 8), (1, 1), (5, 40), (3, 1030), (7, 33)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("rows", "size"), SHAPES)
def test_equals_plain_pytorch(rows: int, size: int, padded: bool, dtype: torch.dtype) -> None:
    gate_up = random_rows(rows, 2 * size, seed=rows, dtype=dtype, padded=padded)
    assert_equal_operations(swiglu, PLAIN.swiglu, [gate_up])


def test_gradient_may_be_an_expanded_tensor() -> None:
    gate_up = random_rows(4, 10, seed=0)
    swiglu(gate_up).sum().backward()
    actual, gate_up.grad = gate_up.grad, None
    PLAIN.swiglu(gate_up).sum().backward()
    torch.testing.assert_close(actual, gate_up.grad)


def test_saves_nothing_but_its_input() -> None:
    saved: list[torch.Tensor] = []
    gate_up = random_rows(4, 10, seed=0)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        swiglu(gate_up)
    assert [tensor.data_ptr() for tensor in saved] == [gate_up.data_ptr()]


def test_refuses_a_dtype_wider_than_its_arithmetic() -> None:
    with pytest.raises(TypeError, match=r"float64.*allowed: torch\.float32 or torch\.bfloat16"):
        swiglu(torch.zeros(2, 4, dtype=torch.float64))
