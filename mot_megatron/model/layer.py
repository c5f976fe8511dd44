"""One transformer layer of the Mixture-of-Transformers (the paper's Algorithm 1) in grouped order.

Letters: K towers, g_k slots of tower k on this rank (divided by tp under sequence parallelism),
t tokens, h hidden size, d head size, tp tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from mot_megatron.config import ModelConfig
from mot_megatron.model.attention_core import AttentionCore
from mot_megatron.model.grouping import Grouping
from mot_megatron.model.norm import RMSNorm
from mot_megatron.model.rotary import RotaryAngles
from mot_megatron.model.towers import ParallelLinears, PerTower

Stream = tuple[torch.Tensor, ...]
"""The residual stream: K tensors [g_k, h]."""


@dataclass(frozen=True)
class Flow:
    """What the layers need to know of a micro-batch besides the stream itself."""

    grouping: Grouping
    rotary: RotaryAngles
    attend: AttentionCore


class Attention(nn.Module):
    """Untied projections around one global attention."""

    def __init__(
        self, config: ModelConfig, linears: ParallelLinears, index: int, recompute_core: bool
    ) -> None:
        super().__init__()
        self.index = index
        self.recompute_core = recompute_core
        num_towers, untied, d = config.num_towers, config.untied, config.head_dim
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        self.group_width = (heads // groups, 1, 1)
        self.local_groups = groups // linears.groups.tensor_size
        self.head_dim = d
        # Rows lie group by group (its queries, its key, its value), so that any TP size that
        # divides the groups cuts between them.
        shape = (groups * sum(self.group_width) * d,)
        self.qkv = PerTower(
            lambda: linears.column(config.hidden_size, shape), num_towers, untied.qkv
        )

        def qk_norm() -> nn.Module:
            if config.qk_norm:
                return RMSNorm(d, config.norm_eps, linears.partial_heads)
            return nn.Identity()

        self.q_norm = PerTower(qk_norm, num_towers, untied.qk_norm)
        self.k_norm = PerTower(qk_norm, num_towers, untied.qk_norm)
        self.output_projection = PerTower(
            lambda: linears.row(heads * d, config.hidden_size),
            num_towers,
            untied.output_projection,
        )

    def forward(self, stream: Stream, flow: Flow) -> Stream:
        """K x [g_k, h] -> K x [g_k, h]."""
        qkv = self.qkv(stream)
        if self.recompute_core and torch.is_grad_enabled():
            mixed = _recomputed(lambda *slices: self._mix(slices, flow), qkv)
        else:
            mixed = self._mix(qkv, flow)
        return self.output_projection(mixed)

    def _mix(self, qkv: Stream, flow: Flow) -> Stream:
        """K x [g_k, groups / tp * width * d] -> K x [g_k, heads / tp * d]: attention itself."""
        width = sum(self.group_width)
        split = [
            part.view(part.shape[0], self.local_groups, width, self.head_dim).split(
                self.group_width, dim=2
            )
            for part in qkv
        ]
        queries, keys, values = zip(*split, strict=True)
        sequence = flow.grouping.to_sequence
        q = flow.rotary.rotate(sequence(self.q_norm(queries)).flatten(1, 2))
        k = flow.rotary.rotate(sequence(self.k_norm(keys)).flatten(1, 2))
        v = sequence(values).flatten(1, 2)
        return flow.grouping.to_towers(flow.attend(self.index, q, k, v).flatten(1))


class FeedForward(nn.Module):
    """SwiGLU of one tower: (silu(x W_gate) * (x W_up)) W_down."""

    def __init__(self, config: ModelConfig, linears: ParallelLinears) -> None:
        super().__init__()
        size = config.feed_forward_size
        self.gate_up = linears.column(config.hidden_size, (2, size))
        self.down = linears.row(size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, h] -> [n, h]."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Layer(nn.Module):
    """Attention and feed-forward with residual connections; post-norm or pre-norm.

    post: h = x + norm(attention(x)), y = h + norm(ffn(h)); pre: norms before the two instead.
    """

    def __init__(
        self, config: ModelConfig, linears: ParallelLinears, index: int, recompute_core: bool
    ) -> None:
        super().__init__()
        num_towers, untied = config.num_towers, config.untied

        def norm() -> nn.Module:
            return RMSNorm(config.hidden_size, config.norm_eps, linears.partial_rows)

        self.attention = Attention(config, linears, index, recompute_core)
        self.attention_norm = PerTower(norm, num_towers, untied.norms)
        self.feed_forward = PerTower(
            lambda: FeedForward(config, linears), num_towers, untied.feed_forward
        )
        self.feed_forward_norm = PerTower(norm, num_towers, untied.norms)
        self.post_norm = config.norm_placement == "post"

    def forward(self, stream: Stream, flow: Flow) -> Stream:
        """K x [g_k, h] -> K x [g_k, h]."""
        if self.post_norm:
            stream = _add(stream, self.attention_norm(self.attention(stream, flow)))
            return _add(stream, self.feed_forward_norm(self.feed_forward(stream)))
        stream = _add(stream, self.attention(self.attention_norm(stream), flow))
        return _add(stream, self.feed_forward(self.feed_forward_norm(stream)))


def run_layer(layer: nn.Module, stream: Stream, flow: Flow, recompute: bool) -> Stream:
    """``layer(stream, flow)``, keeping only its input for backward if ``recompute``."""
    if recompute and torch.is_grad_enabled():
        return _recomputed(lambda *slices: layer(slices, flow), stream)
    return layer(stream, flow)


def _add(stream: Stream, update: Stream) -> Stream:
    return tuple(x + y for x, y in zip(stream, update, strict=True))


def _recomputed(function: Callable[..., Stream], slices: Stream) -> Stream:
    # There is no dropout, so no random state to restore. The re-entrant form is the one that
    # ZeRO-3's partitioned weights survive.
    return checkpoint(function, *slices, use_reentrant=True, preserve_rng_state=False)  # type: ignore[return-value]
