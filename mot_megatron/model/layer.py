"""One transformer layer of the Mixture-of-Transformers (the paper's Algorithm 1) in grouped order.

Letters: K towers, g_k slots of tower k on this rank (divided by tp under sequence parallelism),
t tokens, h hidden size, d head size, tp tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mot_megatron.config_model import ModelConfig
from mot_megatron.model.attention_core import AttentionCore
from mot_megatron.model.exchange import ModalityExchange
from mot_megatron.model.experts import ExpertFeedForward
from mot_megatron.model.grouping import Grouping
from mot_megatron.model.heads import HeadNorms, ProjectedHeads
from mot_megatron.model.norm import ResidualNorm, RMSNorm
from mot_megatron.model.operations import PLAIN, LayerOperations
from mot_megatron.model.rotary import RotaryAngles
from mot_megatron.model.routing import RoutingMode, RoutingPool
from mot_megatron.model.towers import ParallelLinears, PerTower

Stream = tuple[torch.Tensor, ...]
"""The residual stream: a tensor [g_k, h] per tower that this rank holds."""


@dataclass(frozen=True)
class LayerInputs:
    """Per-micro-batch inputs of the layers besides the residual stream."""

    grouping: Grouping | ModalityExchange
    """Moves rows between grouped and sequence order, within a rank or across a modality group."""
    rotary: RotaryAngles
    attend: AttentionCore
    pools: tuple[RoutingPool, ...]
    """One routing pool per tower held."""


class Attention(nn.Module):
    """Untied projections around one global attention."""

    def __init__(
        self,
        config: ModelConfig,
        linears: ParallelLinears,
        index: int,
        recompute_core: bool,
        operations: LayerOperations,
    ) -> None:
        super().__init__()
        self.index = index
        self.recompute_core = recompute_core
        self.operations = operations
        self.qk_norm, self.norm_eps = config.qk_norm, config.norm_eps
        towers = linears.groups.towers_held(config.num_towers)
        untied, d = config.untied, config.head_dim
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        self.heads = ProjectedHeads(groups // linears.groups.tensor_size, heads // groups, d)
        shape = (groups * self.heads.units_per_group * d,)
        self.qkv = PerTower(
            lambda _: linears.column(config.hidden_size, shape, config.add_qkv_bias),
            towers,
            untied.qkv,
        )

        def qk_norm(_tower: int) -> nn.Module:
            if config.qk_norm:
                return RMSNorm(d, config.norm_eps, linears.partial_heads)
            return nn.Identity()

        self.q_norm = PerTower(qk_norm, towers, untied.qk_norm)
        self.k_norm = PerTower(qk_norm, towers, untied.qk_norm)
        self.output_projection = PerTower(
            lambda _: linears.row(heads * d, config.hidden_size),
            towers,
            untied.output_projection,
        )

    def forward(self, stream: Stream, layer_inputs: LayerInputs) -> Stream:
        """Attend: K x [g_k, h] -> K x [g_k, h]."""
        q, k, v, rotate = self._heads(self.qkv(stream), layer_inputs)

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor]:
            return (layer_inputs.attend(self.index, rotate(q), rotate(k), v),)

        # Keep the exchange outside: recomputing it would run its collectives again.
        recompute = self.recompute_core and torch.is_grad_enabled()
        (mixed,) = _recomputed(attend, (q, k, v)) if recompute else attend(q, k, v)
        grouping = layer_inputs.grouping
        if isinstance(grouping, Grouping):
            slices = self.operations.to_towers(grouping, mixed.flatten(1))
        else:
            slices = grouping.from_attention(mixed)
        return self.output_projection(slices)

    def _heads(
        self, projections: Stream, layer_inputs: LayerInputs
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
        """Return q, k, v in sequence order, and the function that rotates q and k if need be."""
        grouping, rotary = layer_inputs.grouping, layer_inputs.rotary
        rotated_heads = self.operations.rotated_heads
        if rotated_heads is not None and isinstance(grouping, Grouping):
            norms = self._head_norms()
            return *rotated_heads(projections, self.heads, norms, grouping, rotary), _unchanged
        queries, keys, values = zip(*map(self.heads.split, projections), strict=True)
        parts = (self.q_norm(queries), self.k_norm(keys), values)
        q, k, v = grouping.to_attention(*(_merge_groups(slices) for slices in parts))
        return q, k, v, rotary.rotate

    def _head_norms(self) -> HeadNorms | None:
        """Return the norm weights, which ZeRO-3 keeps whole outside of their modules too."""
        if not self.qk_norm:
            return None
        return HeadNorms(_weights(self.q_norm), _weights(self.k_norm), self.norm_eps)


def _weights(norms: PerTower) -> Stream:
    return tuple(
        norm.summed_weight() for norm in norms.modules_of_slices if isinstance(norm, RMSNorm)
    )


def _unchanged(x: torch.Tensor) -> torch.Tensor:
    return x


def _merge_groups(slices: Stream) -> Stream:
    """Merge [g_k, groups / tp, heads per group, d] into [g_k, heads / tp, d]."""
    return tuple(part.flatten(1, 2) for part in slices)


class FeedForward(nn.Module):
    """SwiGLU of one tower: (silu(x W_gate) * (x W_up)) W_down."""

    def __init__(
        self, config: ModelConfig, linears: ParallelLinears, operations: LayerOperations = PLAIN
    ) -> None:
        super().__init__()
        size = config.feed_forward_size
        self.gate_up = linears.column(config.hidden_size, (2, size))
        self.down = linears.row(size, config.hidden_size)
        self.operations = operations

    def forward(self, x: torch.Tensor, _pool: RoutingPool) -> torch.Tensor:
        """Apply the network to every row, [n, h] -> [n, h]; the routing pool is unused."""
        return self.down(self.operations.swiglu(self.gate_up(x)))


class Layer(nn.Module):
    """Attention and feed-forward network with residual connections; post-norm or pre-norm.

    Post-norm: h = x + norm(attention(x)), y = h + norm(ffn(h)).
    Pre-norm: h = x + attention(norm(x)), y = h + ffn(norm(h)).
    """

    def __init__(
        self,
        config: ModelConfig,
        linears: ParallelLinears,
        index: int,
        recompute_core: bool,
        routing: RoutingMode,
        operations: LayerOperations = PLAIN,
    ) -> None:
        super().__init__()
        towers, untied = linears.groups.towers_held(config.num_towers), config.untied
        self.post_norm = config.norm_placement == "post"
        size, eps, partial_rows = config.hidden_size, config.norm_eps, linears.partial_rows

        def norm(_tower: int) -> nn.Module:
            return RMSNorm(size, eps, partial_rows)

        def residual_norm(_tower: int) -> nn.Module:
            return ResidualNorm(size, eps, partial_rows, operations, not self.post_norm)

        self.attention = Attention(config, linears, index, recompute_core, operations)
        self.attention_norm = PerTower(
            residual_norm if self.post_norm else norm, towers, untied.norms
        )

        def feed_forward(tower: int) -> nn.Module:
            if config.experts_of_towers[tower] is None:
                return FeedForward(config, linears, operations)
            return ExpertFeedForward(config, linears, tower, routing, operations)

        self.feed_forward = PerTower(feed_forward, towers, untied.feed_forward)
        self.feed_forward_norm = PerTower(residual_norm, towers, untied.norms)

    def forward(self, stream: Stream, layer_inputs: LayerInputs) -> Stream:
        """Apply the layer: K x [g_k, h] -> K x [g_k, h]."""
        pools = layer_inputs.pools
        if self.post_norm:
            stream = self.attention_norm(self.attention(stream, layer_inputs), stream)
            return self.feed_forward_norm(self.feed_forward(stream, pools), stream)
        update = self.attention(self.attention_norm(stream), layer_inputs)
        stream, normed = zip(*self.feed_forward_norm(update, stream), strict=True)
        return _add(stream, self.feed_forward(normed, pools))


def run_layer(
    layer: nn.Module, stream: Stream, layer_inputs: LayerInputs, recompute: bool
) -> Stream:
    """Run ``layer``; with ``recompute``, save only its input and recompute the rest in backward."""
    if recompute and torch.is_grad_enabled():
        return _recomputed(lambda *slices: layer(slices, layer_inputs), stream)
    return layer(stream, layer_inputs)


def _add(stream: Stream, update: Stream) -> Stream:
    return tuple(x + y for x, y in zip(stream, update, strict=True))


def _recomputed(function: Callable[..., Stream], slices: Stream) -> Stream:
    # Without dropout there is no random state to restore. ZeRO-3's partitioned weights work only
    # with the re-entrant form.
    return checkpoint(function, *slices, use_reentrant=True, preserve_rng_state=False)  # type: ignore[return-value]
