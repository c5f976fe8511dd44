"""Keys and values of the tokens so far, so that each new token costs one row instead of all.

It takes the place of the attention core: the model itself does not know that it is generating.
Rows are samples of one prompt, which is computed once and copied to all of them.

Letters: n samples, p prompt tokens, c tokens that fit, d head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mot_megatron.model.attention_core import causal_attention


class KeyValueCache:
    """An attention core that first takes the p rows of a prompt, then n rows, one per sample.

    After each pass through all layers, ``advance`` makes its tokens part of the past.
    """

    def __init__(self, num_samples: int, capacity: int) -> None:
        self.num_samples = num_samples
        self.capacity = capacity
        self.length = 0
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """[p or n, heads, d], heads being this tensor-parallel rank's -> the same shape."""
        if layer not in self._layers:
            shape = (self.num_samples, k.shape[1], self.capacity, k.shape[2])
            self._layers[layer] = (k.new_empty(shape), v.new_empty(shape))
        keys, values = self._layers[layer]
        if self.length == 0:
            keys[:, :, : k.shape[0]] = k.transpose(0, 1)
            values[:, :, : v.shape[0]] = v.transpose(0, 1)
            return causal_attention(q, k, v)
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
        """Count the tokens per sample of the pass that has just ended."""
        self.length += num_tokens
