"""Global self-attention in sequence order, with the best kernel the device offers.

An attention core takes q [t, heads, d] and k, v [t, key-value heads, d] for all documents of a
micro-batch. Each token attends to itself and to the preceding tokens of its document.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from mot_megatron.model.micro_batch import MicroBatch

_BLOCK = 128
"""Queries, or keys, of a block of FlexAttention's mask."""
AttentionCore = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer index, q, k, v) -> output [t, heads, d]; a key-value cache uses the layer index."""


def build_attention_core(
    micro_batch: MicroBatch, backend: Literal["auto", "sdpa", "flex"]
) -> AttentionCore:
    """Build the attention core for a micro-batch on its device.

    "auto" selects FlexAttention on CUDA and torch's scaled dot product attention elsewhere, because
    FlexAttention has no backward pass on a CPU.
    """
    on_cuda = micro_batch.token_ids.is_cuda
    if backend == "flex" or (backend == "auto" and on_cuda):
        return FlexDocumentAttention(micro_batch.document_ids, compiled=on_cuda)
    return DocumentAttention(micro_batch.document_ids)


class DocumentAttention:
    """Causal scaled dot product attention, one call per document.

    Packed documents are much shorter than the sequence, so separate calls do a fraction of the work
    of a single call with a [t, t] mask when the kernel cannot skip masked blocks.
    """

    def __init__(self, document_ids: torch.Tensor) -> None:
        sequence_length = document_ids.shape[1]
        rows = torch.arange(document_ids.shape[0], device=document_ids.device)
        flat = (document_ids + rows[:, None] * sequence_length).flatten()
        self.lengths: list[int] = torch.unique_consecutive(flat, return_counts=True)[1].tolist()

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """Attend within each document; see the module docstring for shapes."""
        del layer
        parts = (tensor.split(self.lengths) for tensor in (q, k, v))
        return torch.cat([causal_attention(*part) for part in zip(*parts, strict=True)])


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Compute causal attention within one document of n tokens.

    Args:
        q: [n, heads, d].
        k: [n, key-value heads, d]; grouped-query attention is allowed.
        v: Same shape as ``k``.

    Returns:
        [n, heads, d].
    """
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
    output = F.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
    )
    return output[0].transpose(0, 1)


class FlexDocumentAttention:
    """FlexAttention with a block mask: one kernel for all documents that skips empty blocks."""

    def __init__(self, document_ids: torch.Tensor, compiled: bool) -> None:
        self.num_rows = document_ids.shape[0]
        self.mask = document_block_mask(document_ids)
        self.attend = _compiled_flex_attention if compiled else flex_attention

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """Attend within each document; see the module docstring for shapes."""
        del layer
        # [b * s, heads, d] -> [b, heads, s, d]
        q, k, v = (t.unflatten(0, (self.num_rows, -1)).transpose(1, 2) for t in (q, k, v))
        output = self.attend(q, k, v, block_mask=self.mask, enable_gqa=q.shape[1] != k.shape[1])
        assert isinstance(output, torch.Tensor)
        return output.transpose(1, 2).flatten(0, 1)


_compiled_flex_attention = torch.compile(flex_attention, dynamic=False)


def document_block_mask(document_ids: torch.Tensor) -> BlockMask:
    """Build the block-sparse causal mask [b, s, s] within documents, without that of all pairs.

    Because documents are contiguous, the ids at the borders of blocks tell what a block contains.
    The query block i sees a part of the key block j < i if the last key and the first query are of
    one document, and all of it if the first key and the last query are.

    Args:
        document_ids: [b, s] integers, equal within a document and ascending along a sequence.
    """
    length = document_ids.shape[1]

    def visible(
        row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        del head
        same = document_ids[row, query] == document_ids[row, key]
        return (query >= key) & same

    first = document_ids[:, ::_BLOCK]
    num_blocks = first.shape[1]
    ends = torch.arange(1, num_blocks + 1, device=document_ids.device) * _BLOCK - 1
    last = document_ids[:, ends.clamp(max=length - 1)]
    block = torch.arange(num_blocks, device=document_ids.device)
    earlier = block[:, None] > block
    complete = (ends < length)[:, None]
    full = earlier & complete & (last[:, :, None] == first[:, None, :])
    touched = earlier & (first[:, :, None] == last[:, None, :])
    partial = (touched & ~full) | (block[:, None] == block)
    return BlockMask.from_kv_blocks(
        *_in_order(partial),
        *_in_order(full),
        BLOCK_SIZE=_BLOCK,
        mask_mod=visible,
        seq_lengths=(length, length),
    )


def _in_order(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the number of marked blocks of each row, and the blocks with the marked ones first."""
    blocks = blocks[:, None].int()  # one mask for all heads
    order = blocks.argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.int()
