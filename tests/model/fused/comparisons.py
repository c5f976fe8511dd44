"""Compare a fused operation with plain PyTorch: outputs and gradients, computed in fp32.

A kernel computes in fp32 and rounds its result once. In fp32 it may differ from PyTorch by the
order of a sum: 1e-5 of the element and of the mean covers sums of a few hundred terms. In bf16 its
result is compared with one that PyTorch computes in fp32 from the same inputs. They may differ by
one rounding, for which Triton's interpreter drops bits, unlike a GPU: 2^-7 of the element.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-7}
Operation = Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]


def random_rows(
    *shape: int, seed: int, dtype: torch.dtype = torch.float32, padded: bool = False
) -> torch.Tensor:
    """Return normal numbers; ``padded``: rows that are not adjacent in memory."""
    generator = torch.Generator().manual_seed(seed)
    last = shape[-1] + 3 * padded
    rows = torch.randn(*shape[:-1], last, generator=generator).to(dtype)
    return rows[..., : shape[-1]].requires_grad_()


def assert_equal_operations(
    fused: Operation, plain: Operation, inputs: Sequence[torch.Tensor]
) -> None:
    """Check that ``fused`` gives the outputs of ``plain`` and the gradients of all inputs."""
    dtype = inputs[0].dtype
    wide = [tensor.detach().float().requires_grad_(tensor.requires_grad) for tensor in inputs]
    outputs, expected = _tuple(fused(*inputs)), _tuple(plain(*wide))
    arriving = [
        torch.randn(output.shape, generator=torch.Generator().manual_seed(index)).to(dtype)
        for index, output in enumerate(outputs)
    ]
    torch.autograd.backward(outputs, arriving)
    torch.autograd.backward(expected, [gradient.float() for gradient in arriving])
    for output, reference in zip(outputs, expected, strict=True):
        assert output.dtype == dtype
        assert_near(output, reference, TOLERANCES[dtype])
    for given, reference in zip(inputs, wide, strict=True):
        if given.requires_grad:
            assert given.grad is not None
            assert reference.grad is not None
            assert_near(given.grad, reference.grad, TOLERANCES[dtype])


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Compare within ``tolerance`` of each element and the mean; 1e-6 for results that cancel."""
    scale = float(expected.detach().abs().mean()) if expected.numel() else 0.0
    torch.testing.assert_close(
        actual.detach().float(), expected.detach(), rtol=tolerance, atol=tolerance * scale + 1e-6
    )


def _tuple(result: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)
