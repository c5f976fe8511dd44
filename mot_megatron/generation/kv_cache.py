"""A key-value cache, so that each new token costs one row of attention instead of a full pass.

It replaces the attention core, so the model needs no code for generation. All samples continue one
prompt, which is computed once and copied to all of them.

Letters: n samples, p prompt tokens, c capacity in tokens, d head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mot_megatron.model.attention_core import attend_in_document


class KeyValueCache:
    """An attention core for the p rows of a prompt, then for n rows per call, one per sample.

    After each pass through all layers, ``advance`` adds its tokens to the past.
    """

    def __init__(self, num_samples: int, capacity: int) -> None:
        self.num_samples = num_samples
        self.capacity = capacity
        self.length = 0
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """Attend to all tokens so far.

        Args:
            layer: Index of the layer.
            q: [p or n, heads of this tensor-parallel rank, d].
            k: [p or n, key-value heads, d].
            v: Same shape as ``k``.

        Returns:
            Same shape as ``q``.
        """
        if layer not in self._layers:
            shape = (self.num_samples, k.shape[1], self.capacity, k.shape[2])
            self._layers[layer] = (k.new_empty(shape), v.new_empty(shape))
        keys, values = self._layers[layer]
        if self.length == 0:
            keys[:, :, : k.shape[0]] = k.transpose(0, 1)
            values[:, :, : v.shape[0]] = v.transpose(0, 1)
            return attend_in_document(q, k, v)
        end = self.length + 1
        keys[:, :, self.length] = k
        values[:, :, self.length] = v
        output = F.scaled_dot_product_attention(
            q[:, :, None],
            keys[:, :, :end],
            values[:, :, :end],
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return output[:, :, 0]

    def advance(self, num_tokens: int) -> None:
        """Add the tokens of the finished pass, ``num_tokens`` per sample, to the past."""
        self.length += num_tokens
