"""Global self-attention in sequence order, with the best kernel the device offers.

An attention core takes q [t, heads, d] and k, v [t, key-value heads, d] for all documents of a
micro-batch. Each position attends to one interval of its document, which contains the position:
tokens to everything up to themselves, the parts of an image to all of the image too.
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
    visible = micro_batch.visible_from, micro_batch.visible_to
    if backend == "flex" or (backend == "auto" and on_cuda):
        return FlexDocumentAttention(*visible, compiled=on_cuda)
    return DocumentAttention(*visible)


class DocumentAttention:
    """Scaled dot product attention, one call per document.

    Packed documents are much shorter than the sequence, so separate calls do a fraction of the work
    of a single call with a [t, t] mask when the kernel cannot skip masked blocks. A document that
    falls into parts which do not see each other is treated as several.
    """

    def __init__(self, visible_from: torch.Tensor, visible_to: torch.Tensor) -> None:
        """Find the documents, and build the masks of those that are not causal.

        Args:
            visible_from: [b, s] int32, first position of its sequence that each position sees.
            visible_to: [b, s] int32, position after the last one that each position sees.
        """
        length = visible_from.shape[1]
        offsets = length * torch.arange(len(visible_from), device=visible_from.device)[:, None]
        first, end = ((of_rows + offsets).flatten() for of_rows in (visible_from, visible_to))
        places = torch.arange(len(first), device=first.device)
        # A document begins where nothing from there on sees back, and nothing before sees so far.
        begins = first.flip(0).cummin(0).values.flip(0) >= places
        begins[1:] &= end.cummax(0).values[:-1] <= places[1:]
        document = begins.cumsum(0) - 1
        starts = (places * begins).cummax(0).values
        unusual = (first != starts) | (end != places + 1)
        self.lengths: list[int] = torch.unique_consecutive(document, return_counts=True)[1].tolist()
        self.masks: list[torch.Tensor | None] = [None] * len(self.lengths)
        """Per document the pairs that see each other, [n, n] bool; None if it is causal."""
        parts = [of.split(self.lengths) for of in (places, first, end)]
        for number in sorted(set(document[unusual].tolist())):
            keys, its_first, its_end = (part[number] for part in parts)
            self.masks[number] = (keys >= its_first[:, None]) & (keys < its_end[:, None])

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """Attend within each document; see the module docstring for shapes."""
        del layer
        queries, keys, values = (tensor.split(self.lengths) for tensor in (q, k, v))
        documents = zip(queries, keys, values, self.masks, strict=True)
        return torch.cat([attend_in_document(*document) for document in documents])


def attend_in_document(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute attention within one document of n tokens.

    Args:
        q: [n, heads, d].
        k: [n, key-value heads, d]; grouped-query attention is allowed.
        v: Same shape as ``k``.
        mask: [n, n] bool, whether a query (row) sees a key (column). Default: causal.

    Returns:
        [n, heads, d].
    """
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
    output = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
    )
    return output[0].transpose(0, 1)


class FlexDocumentAttention:
    """FlexAttention with a block mask: one kernel for all documents that skips empty blocks."""

    def __init__(
        self, visible_from: torch.Tensor, visible_to: torch.Tensor, compiled: bool
    ) -> None:
        self.num_rows = visible_from.shape[0]
        self.mask = interval_block_mask(visible_from, visible_to)
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


def interval_block_mask(visible_from: torch.Tensor, visible_to: torch.Tensor) -> BlockMask:
    """Build the block-sparse mask [b, s, s] of visible intervals, without that of all pairs.

    Because an interval contains its own position, those of neighboring queries touch: together the
    queries of a block see the interval from the smallest begin to the largest end, and all of them
    see that from the largest begin to the smallest end. A block of keys is computed if it meets the
    former, and without a mask if it lies in the latter.

    Args:
        visible_from: [b, s] int32, first position of its sequence that each position sees.
        visible_to: [b, s] int32, position after the last one that each position sees.
    """
    length = visible_from.shape[1]

    def visible(
        row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        del head
        return (key >= visible_from[row, query]) & (key < visible_to[row, query])

    num_blocks = -(-length // _BLOCK)
    starts = torch.arange(num_blocks, device=visible_from.device) * _BLOCK
    ends = starts + _BLOCK
    queries = starts[:, None] + torch.arange(_BLOCK, device=visible_from.device)
    # [b, blocks, _BLOCK]; the last query also stands for those that the last block lacks.
    first, end = (of[:, queries.clamp(max=length - 1)] for of in (visible_from, visible_to))
    touched = (first.amin(-1)[..., None] < ends) & (end.amax(-1)[..., None] > starts)
    seen_by_all = (first.amax(-1)[..., None] <= starts) & (end.amin(-1)[..., None] >= ends)
    full = seen_by_all & (ends <= length)[:, None]
    return BlockMask.from_kv_blocks(
        *_in_order(touched & ~full),
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
