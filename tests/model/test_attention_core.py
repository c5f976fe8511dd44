"""Attention within documents equals one masked attention over the whole micro-batch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
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
    interval_block_mask,
)
from tests.model.small_models import random_tokens, small_config
from tests.model.visibility import Visibility

NAMES = ["text", "image", "speech"]
KEY_VALUE_HEADS = pytest.mark.parametrize("key_value_heads", [4, 2, 1])
IMAGES = pytest.mark.parametrize("images", [False, True], ids=["causal", "images"])


@dataclass(frozen=True)
class Packed:
    """Visible intervals of a batch [2, 32], and the same as a mask [64, 64]."""

    intervals: tuple[torch.Tensor, torch.Tensor]
    mask: torch.Tensor


def batch(images: bool, seed: int = 0) -> Packed:
    """Return the intervals of documents with or without images."""
    tokens = random_tokens(seed, NAMES, (1, 1, 1), shape=(2, 32))
    assert len(tokens.documents.unique()) > 4
    if images:
        visibility = Visibility.random(tokens.document_ids, seed)
        return Packed(tensors(visibility.intervals), visibility.batch_mask)
    found = tokens.micro_batch(small_config({name: name for name in NAMES}))
    visible = tokens.documents[:, None] == tokens.documents
    mask = visible & torch.ones(64, 64).tril().bool()
    return Packed((found.visible_from, found.visible_to), mask)


def tensors(intervals: tuple[np.ndarray, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    first, end = (torch.from_numpy(values.astype(np.int32)) for values in intervals)
    return first, end


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


@pytest.mark.parametrize("seed", range(4))
@IMAGES
@KEY_VALUE_HEADS
def test_document_attention_equals_masked_attention(
    key_value_heads: int, images: bool, seed: int
) -> None:
    packed = batch(images, seed)
    core, mask = DocumentAttention(*packed.intervals), packed.mask
    assert any(of is not None for of in core.masks) == images
    results = []
    for attend in (lambda q, k, v: core(0, q, k, v), lambda q, k, v: masked(q, k, v, mask)):
        qkv = [part.requires_grad_() for part in random_qkv(key_value_heads, torch.float64)]
        output = attend(*qkv)
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        results.append([output.detach(), *(part.grad for part in qkv)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_document_is_cut_where_no_part_sees_another() -> None:
    """A caption, its image without the caption, another document with text after its image."""
    first = torch.tensor([[0, 0, 2, 2, 4, 5, 5, 4]], dtype=torch.int32)
    end = torch.tensor([[1, 2, 4, 4, 5, 7, 7, 8]], dtype=torch.int32)
    core = DocumentAttention(first, end)
    assert core.lengths == [2, 2, 4]
    assert core.masks[0] is None
    assert core.masks[1] is not None
    assert core.masks[1].all()
    assert core.masks[2] is not None
    expected = [[1, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [1, 1, 1, 1]]
    assert core.masks[2].int().tolist() == expected


@IMAGES
@KEY_VALUE_HEADS
def test_flex_attention_equals_document_attention(
    key_value_heads: int, images: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Otherwise torch compiles its reference implementation, and the tests disable compilation.
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    intervals = batch(images).intervals
    qkv = random_qkv(key_value_heads, torch.float32)
    torch.testing.assert_close(
        FlexDocumentAttention(*intervals, compiled=False)(0, *qkv),
        DocumentAttention(*intervals)(0, *qkv),
        rtol=1e-5,
        atol=1e-5,
    )


@IMAGES
@pytest.mark.parametrize("length", [1, 127, 128, 129, 512, 1000])
def test_the_block_mask_is_that_of_all_pairs(length: int, images: bool) -> None:
    """Documents begin and end inside of blocks and at their borders; some span several blocks."""
    generator = torch.Generator().manual_seed(length)
    rows = [torch.zeros(length), torch.arange(length) // 128, torch.arange(length)]
    for mean in (10, 100, 400):
        begins = torch.rand(length, generator=generator) < 1 / mean
        rows.append(begins.cumsum(0))
    ids = torch.stack([row.long() for row in rows]).numpy()
    visibility = Visibility.random(ids, length)
    if images:
        # Long images too, which blocks lie inside of.
        whole = np.array([[1], [0], [0], [0], [1], [1]], dtype=bool) & (ids % 2 == 0)
        visibility = dataclasses.replace(
            visibility,
            images=np.where(whole, ids, visibility.images),
            alone=visibility.alone & ~whole,
        )
    else:
        visibility = dataclasses.replace(
            visibility, images=np.full_like(ids, -1), alone=np.zeros_like(ids, dtype=bool)
        )
    mask = torch.from_numpy(visibility.mask)

    def visible(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return mask[row, query, key]

    expected = create_block_mask(visible, len(ids), None, length, length, device="cpu")
    actual = interval_block_mask(*tensors(visibility.intervals))
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
@IMAGES
@KEY_VALUE_HEADS
def test_compiled_flex_attention_on_a_gpu(
    key_value_heads: int, images: bool, dtype: torch.dtype, tolerance: float
) -> None:
    # bf16 has 8 bits, so sums of products of unit size differ by a percent or two.
    packed = batch(images)
    first, end = packed.intervals
    core, mask = FlexDocumentAttention(first.cuda(), end.cuda(), compiled=True), packed.mask
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
