"""FlexAttention against one call of scaled dot-product attention per document."""

from __future__ import annotations

import torch

from mot_megatron.machine_check.checks import Context
from mot_megatron.machine_check.outcome import Outcome
from mot_megatron.machine_check.probes import COMPILES_NOT, compiles, relative_error
from mot_megatron.model.attention_core import (
    AttentionCore,
    DocumentAttention,
    FlexDocumentAttention,
)

_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""bf16 has 8 bits: products of a few hundred terms differ by about half a percent."""
_MOST_COMPILED = 3
"""Compilations of FlexAttention: contiguous and strided values, and without gradients."""


def attention(context: Context, *, head_dim: int, heads: int, groups: int, length: int) -> Outcome:
    """Compare both attention cores on four batches of documents.

    Half of the batches have values that are strided slices of a larger tensor, and the documents of
    two have images, which see all of themselves. On a GPU, in bf16, forward and backward; on a CPU,
    where FlexAttention has no backward, in fp32 and forward only.

    Args:
        context: The machine.
        head_dim: Width of a head.
        heads: Query heads.
        groups: Key-value heads.
        length: Tokens of a sequence.
    """
    if not compiles():
        return COMPILES_NOT
    device = torch.device(context.device)
    dtype = torch.bfloat16 if context.on_gpu else torch.float32
    names = ("output", "q gradient", "k gradient", "v gradient")
    worst: dict[str, float] = dict.fromkeys(names if context.on_gpu else names[:1], 0.0)
    for number in range(4):
        generator = torch.Generator().manual_seed(number)
        visible = tuple(of.to(device) for of in _visible(length, number > 1, generator))
        shapes = [(2 * length, count, head_dim) for count in (heads, groups, 2 * groups)]
        q, k, wide = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
        v = wide[:, ::2] if number % 2 else wide[:, :groups].contiguous()
        upstream = torch.randn(shapes[0], generator=generator).to(device, dtype)
        flex = FlexDocumentAttention(*visible, compiled=context.on_gpu)
        got = _run(flex, (q, k, v), upstream, context.on_gpu)
        plain = _run(
            DocumentAttention(*visible),
            tuple(tensor.float() for tensor in (q, k, v)),
            upstream.float(),
            context.on_gpu,
        )
        for name, one, other in zip(worst, got, plain, strict=True):
            error = relative_error(one, other)
            worst[name] = error if error != error else max(worst[name], error)
    return _judge(context, worst, dtype, head_dim)


def _visible(
    length: int, images: bool, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the visible intervals of two sequences of documents, [2, length] int32 each.

    With images, each document ends with one that sees all of itself, about half of it.
    """
    places = torch.arange(length).expand(2, -1)
    starts = torch.rand(2, length, generator=generator) < 8 / length
    first = (places * starts).cummax(1).values
    end = places + 1
    if images:
        last = torch.where(starts, places, length).roll(-1, 1)
        last[:, -1] = length
        last = last.flip(1).cummin(1).values.flip(1)
        end = torch.where(2 * places >= first + last, last, end)
    return first.int(), end.int()


def _run(
    core: AttentionCore, tensors: tuple[torch.Tensor, ...], upstream: torch.Tensor, backward: bool
) -> tuple[torch.Tensor | None, ...]:
    """Return the output, and with ``backward`` the gradients of q, k and v."""
    leaves = [tensor.detach().requires_grad_(backward) for tensor in tensors]
    output = core(0, *leaves)
    if not backward:
        return (output,)
    output.backward(upstream)
    return (output, *(leaf.grad for leaf in leaves))


def _judge(context: Context, worst: dict[str, float], dtype: torch.dtype, head_dim: int) -> Outcome:
    shown = ", ".join(f"{name} {error:.1e}" for name, error in worst.items())
    name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    seen = f"relative errors in {name}, heads of {head_dim}: {shown}"
    numbers = {"relative_errors": worst}
    if not all(error <= _TOLERANCES[dtype] for error in worst.values()):
        advice = 'FlexAttention is wrong here: set model.attention_backend = "sdpa"'
        return Outcome("FAIL", seen, advice, numbers)
    if not context.on_gpu:
        return Outcome("PASS", f"{seen}; forward only, as FlexAttention has no backward on CPUs")
    count = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    seen = f"{seen}; {count} compilations for 4 batches"
    if count > _MOST_COMPILED:
        advice = (
            f"more than {_MOST_COMPILED}: new documents compile anew; see TORCH_LOGS=recompiles"
        )
        return Outcome("SLOW", seen, advice, numbers)
    return Outcome("PASS", seen, "", numbers)
