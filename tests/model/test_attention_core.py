"""Attention within documents equals one masked attention over the whole micro-batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import flex_attention
from torch.nn.attention.flex_attention import create_block_mask

from mot_megatron.model.attention_core import (
    DocumentAttention,
    FlexDocumentAttention,
    build_attention_core,
    document_block_mask,
)
from tests.model.small_models import random_tokens, small_config

NAMES = ["text", "image", "speech"]
KEY_VALUE_HEADS = pytest.mark.parametrize("key_value_heads", [4, 2, 1])


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Return (document ids [2, 32], mask [64, 64]); both sequences contain a document 0."""
    tokens = random_tokens(0, NAMES, (1, 1, 1), shape=(2, 32))
    ids = torch.from_numpy(tokens.document_ids)
    assert len(tokens.documents.unique()) > 4
    visible = tokens.documents[:, None] == tokens.documents
    return ids - ids[:, :1], visible & torch.ones(64, 64).tril().bool()


def random_qkv(key_value_heads: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(64, heads, 16, generator=generator, dtype=torch.float64).to(dtype)
        for heads in (4, key_value_heads, key_value_heads)
    ]


def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
    k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1)


@KEY_VALUE_HEADS
def test_document_attention_equals_masked_attention(key_value_heads: int) -> None:
    document_ids, mask = batch()
    core = DocumentAttention(document_ids)
    results = []
    for attend in (lambda q, k, v: core(0, q, k, v), lambda q, k, v: masked(q, k, v, mask)):
        qkv = [part.requires_grad_() for part in random_qkv(key_value_heads, torch.float64)]
        output = attend(*qkv)
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        results.append([output.detach(), *(part.grad for part in qkv)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@KEY_VALUE_HEADS
def test_flex_attention_equals_document_attention(
    key_value_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Otherwise torch compiles its reference implementation, and the tests disable compilation.
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    document_ids, _ = batch()
    qkv = random_qkv(key_value_heads, torch.float32)
    torch.testing.assert_close(
        FlexDocumentAttention(document_ids, compiled=False)(0, *qkv),
        DocumentAttention(document_ids)(0, *qkv),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("length", [1, 127, 128, 129, 512, 1000])
def test_the_block_mask_is_that_of_all_pairs(length: int) -> None:
    """Documents begin and end inside of blocks and at their borders; some span several blocks."""
    generator = torch.Generator().manual_seed(length)
    rows = [torch.zeros(length), torch.arange(length) // 128, torch.arange(length)]
    for mean in (10, 100, 400):
        begins = torch.rand(length, generator=generator) < 1 / mean
        rows.append(begins.cumsum(0))
    ids = torch.stack([row.long() for row in rows])

    def visible(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (ids[row, query] == ids[row, key])

    expected = create_block_mask(visible, len(ids), None, length, length, device="cpu")
    actual = document_block_mask(ids)
    assert actual.seq_lengths == expected.seq_lengths
    assert actual.BLOCK_SIZE == expected.BLOCK_SIZE
    for name in ("kv", "full_kv", "q", "full_q"):
        counts, indices = getattr(expected, f"{name}_num_blocks"), f"{name}_indices"
        assert torch.equal(getattr(actual, f"{name}_num_blocks"), counts), name
        for place in counts.nonzero():
            count = counts[tuple(place)]
            of_row = (getattr(mask, indices)[tuple(place)][:count] for mask in (actual, expected))
            assert torch.equal(*of_row), (name, place)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
@KEY_VALUE_HEADS
def test_compiled_flex_attention_on_a_gpu(
    key_value_heads: int, dtype: torch.dtype, tolerance: float
) -> None:
    # bf16 has 8 bits, so sums of products of unit size differ by a percent or two.
    document_ids, mask = batch()
    core = FlexDocumentAttention(document_ids.cuda(), compiled=True)
    results = []
    for device, kind in (("cpu", torch.float64), ("cuda", dtype)):
        q, k, v = (
            part.to(device, kind).requires_grad_()
            for part in random_qkv(key_value_heads, torch.float64)
        )
        output = core(0, q, k, v) if device == "cuda" else masked(q, k, v, mask)
        weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output)
        (output * weights.to(device, kind)).sum().backward()
        gradients = [part.grad for part in (q, k, v) if part.grad is not None]
        results.append([part.double().cpu() for part in (output.detach(), *gradients)])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_auto_takes_sdpa_on_a_cpu() -> None:
    config = small_config({name: name for name in NAMES})
    micro_batch = random_tokens(0, NAMES, (1, 1, 1)).micro_batch(config)
    assert isinstance(build_attention_core(micro_batch, "auto"), DocumentAttention)
    assert isinstance(build_attention_core(micro_batch, "sdpa"), DocumentAttention)
    assert isinstance(build_attention_core(micro_batch, "flex"), FlexDocumentAttention)
