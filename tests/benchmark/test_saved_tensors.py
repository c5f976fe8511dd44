"""The counter of tensors saved for backward, on graphs small enough to count by hand."""

from __future__ import annotations

import torch
from torch import nn

from mot_megatron.benchmark.saved_tensors import SavedForBackward


def test_storages_count_once_until_backward() -> None:
    weight = nn.Parameter(torch.ones(8, 8))
    counter = SavedForBackward([weight])
    x = torch.ones(4, 8, requires_grad=True)
    with counter.watch():
        y = x @ weight  # saves x, 4 * 8 * 4 = 128 bytes, and the weight, which does not count
        assert counter.peak_bytes == 128
        z = (x * y).exp()  # x is already saved; y and the result have 128 bytes each
        assert counter.peak_bytes == 3 * 128
        halves = z.chunk(2)
        product = halves[0] * halves[1]  # views of the result
        assert counter.peak_bytes == 3 * 128
        product.sum().backward()
        # Everything has been released, so this does not reach a new peak.
        torch.ones(64, requires_grad=True).exp()
    assert counter.peak_bytes == 3 * 128
    assert x.grad is not None
    assert weight.grad is not None


def test_gradients_are_those_without_the_counter() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 8, requires_grad=True)
    layer = nn.Linear(8, 8)
    (expected,) = torch.autograd.grad(torch.tanh(layer(x)).square().sum(), x)
    with SavedForBackward(layer.parameters()).watch():
        (counted,) = torch.autograd.grad(torch.tanh(layer(x)).square().sum(), x)
    assert torch.equal(expected, counted)
