"""A tower's feed-forward network as a mixture of experts.

A router assigns rows to experts, and a rank's experts run as one grouped matrix multiplication. A
rank that holds all experts unsharded gathers and scatters rows locally. Under expert or tensor
parallelism, megatron's all-to-all dispatcher moves rows to their experts and back.

Letters: n rows of this rank, r rows at its experts, E experts of which it holds e, h hidden size, f
feed-forward width, tp tensor-parallel size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_utils import permute, unpermute
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import nn

from mot_megatron.config_model import ModelConfig
from mot_megatron.model.operations import PLAIN, LayerOperations
from mot_megatron.model.routing import Routing, RoutingMode, RoutingPool, router_class
from mot_megatron.model.sharding import ParameterSharding, mark_experts, set_sharding
from mot_megatron.model.towers import ParallelLinears


class ExpertFeedForward(nn.Module):
    """A mixture of experts in place of a feed-forward network; unassigned rows become zeros."""

    def __init__(
        self,
        config: ModelConfig,
        linears: ParallelLinears,
        tower: int,
        mode: RoutingMode,
        operations: LayerOperations = PLAIN,
    ) -> None:
        """Build one layer's expert FFN for a local tower."""
        super().__init__()
        settings = config.experts_of_towers[tower]
        assert settings is not None
        groups = linears.groups.experts_of(tower)
        held = groups.held(settings.num_moe_experts)
        self.router = router_class(settings)(
            settings,
            config.hidden_size,
            tower,
            mode,
            pool_group=linears.partial_rows,
            balancing_group=linears.groups.balancing.get(tower, linears.partial_rows),
        )
        self.experts = GroupedExperts(config, held, linears.groups.tensor_size, operations)
        self.dispatcher = None
        if groups.tensor_expert.size() > 1:
            self.dispatcher = MoEAlltoAllTokenDispatcher(
                len(held),
                list(held),
                _dispatcher_config(config, linears, settings.num_moe_experts),
                ProcessGroupCollection(
                    ep=groups.expert,
                    expt_tp=linears.groups.tensor,
                    tp_ep=groups.tensor_expert,
                ),
            )

    def forward(self, x: torch.Tensor, pool: RoutingPool) -> torch.Tensor:
        """Apply the experts: [n, h] -> [n, h].

        Collectives besides the router's: all-to-alls of rows over the expert-parallel group, to the
        experts and back; an all-gather and a reduce-scatter of rows over the tensor-parallel group;
        a small all-gather of counts over both. Backward runs the same number.
        """
        routing = self.router(x, pool)
        if self.dispatcher is not None:
            return self._dispatched(x, routing, self.dispatcher)
        return self._in_place(x, routing)

    def _in_place(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        if routing.chosen is None:
            rows, weights, index = permute(x, routing.assigned, probs=routing.weights)
            assert weights is not None
            outputs = self.experts(rows, routing.assigned.sum(0), weights)
            return unpermute(outputs, index, x.shape)
        # Every expert takes the same number of rows, so no size depends on device results. Without
        # a grouped kernel (fp32 on GPUs), grouped_mm still reads its offsets on the host.
        num_experts, k = routing.chosen.shape
        index = routing.chosen.flatten()
        weights = routing.weights.T.gather(1, routing.chosen).flatten()
        counts = torch.full((num_experts,), k, device=x.device)
        outputs = self.experts(x.index_select(0, index), counts, weights)
        return torch.zeros_like(x).index_add(0, index, outputs)

    def _dispatched(
        self, x: torch.Tensor, routing: Routing, dispatcher: MoEAlltoAllTokenDispatcher
    ) -> torch.Tensor:
        rows, weights = dispatcher.dispatch_preprocess(x, routing.assigned, routing.weights)
        rows, weights = dispatcher.token_dispatch(rows, weights)
        rows, counts, weights = dispatcher.dispatch_postprocess(rows, weights)
        outputs = dispatcher.combine_preprocess(self.experts(rows, counts, weights))
        return dispatcher.combine_postprocess(dispatcher.token_combine(outputs))


class GroupedExperts(nn.Module):
    """Stacked SwiGLU networks of a rank's experts: (silu(x W_gate) * (x W_up)) W_down."""

    def __init__(
        self, config: ModelConfig, held: range, tensor_size: int, operations: LayerOperations
    ) -> None:
        """Allocate this rank's tensor-parallel shard of the experts ``held``."""
        super().__init__()
        h, f = config.hidden_size, config.feed_forward_size
        self.num_held = len(held)
        self.operations = operations
        self.gate_up = nn.Parameter(torch.empty(self.num_held * 2 * f // tensor_size, h))
        self.down = nn.Parameter(torch.empty(self.num_held * h, f // tensor_size))
        set_sharding(self.gate_up, ParameterSharding((2, f, h), shard_dim=1))
        set_sharding(self.down, ParameterSharding((h, f), shard_dim=1))
        mark_experts(self.gate_up, held)
        mark_experts(self.down, held)

    def forward(
        self, rows: torch.Tensor, counts: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Apply each expert to its contiguous rows. No collectives.

        Args:
            rows: [r, h], ordered by expert.
            counts: [e], rows of each expert.
            weights: [r], factor of each row's output.

        Returns:
            [r, h]; under tensor parallelism this rank's partial sum.
        """
        ends = counts.to(rows.device).cumsum(0).to(torch.int32)
        gate_up = self.gate_up.unflatten(0, (self.num_held, -1)).transpose(1, 2)
        down = self.down.unflatten(0, (self.num_held, -1)).transpose(1, 2)
        inner = self.operations.swiglu(F.grouped_mm(rows, gate_up, offs=ends))
        outputs = F.grouped_mm(inner, down, offs=ends)
        return outputs * weights.to(outputs.dtype)[:, None]


def _dispatcher_config(
    config: ModelConfig, linears: ParallelLinears, num_experts: int
) -> TransformerConfig:
    """Return the settings that the dispatcher reads; no layer is built from them."""
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_moe_experts=num_experts,
        moe_ffn_hidden_size=config.feed_forward_size,
        # With any capacity factor the dispatcher counts rows; otherwise it assumes k per token.
        moe_expert_capacity_factor=1.0,
        moe_token_dispatcher_type="alltoall",
        cuda_graph_scope=[],  # the default triggers a deprecation warning
        add_bias_linear=False,
        tensor_model_parallel_size=linears.groups.tensor_size,
        sequence_parallel=linears.sequence_parallel,
        params_dtype=linears.dtype,
        use_cpu_initialization=True,
    )
