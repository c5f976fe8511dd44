"""A tower's feed-forward network as a mixture of experts.

A router says which experts a row goes to; the experts of a rank are one grouped matrix
multiplication. Where a rank holds all experts whole, rows are picked and added in place. With
expert or tensor parallelism megatron's all-to-all dispatcher carries rows to their experts and
back.

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

from mot_megatron.config import ModelConfig
from mot_megatron.model.routing import Routing, RoutingMode, RoutingPool, router_class
from mot_megatron.model.sharding import ParameterSharding, mark_experts, set_sharding
from mot_megatron.model.towers import ParallelLinears


class ExpertFeedForward(nn.Module):
    """In place of a feed-forward network; rows that no expert takes come out as zeros."""

    def __init__(
        self, config: ModelConfig, linears: ParallelLinears, tower: int, mode: RoutingMode
    ) -> None:
        """Make the one of a tower that this rank holds, for one layer."""
        super().__init__()
        settings = config.experts_of_towers[tower]
        assert settings is not None
        groups = linears.groups.experts_of(tower)
        held = groups.held(settings.num_moe_experts)
        self.router = router_class(settings)(
            settings, config.hidden_size, tower, mode, pool_group=linears.partial_rows
        )
        self.experts = GroupedExperts(config, held, linears.groups.tensor_size)
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
        """[n, h] -> [n, h].

        Collectives, besides the router's: over expert parallelism all-to-alls of rows there and
        back, over tensor parallelism an all-gather and a reduce-scatter of them, and a small
        all-gather of counts over both; the same number in backward.
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
        # As many for every expert: no size here depends on what the device has computed. Only where
        # torch has no grouped kernel, as for fp32 on GPUs, grouped_mm reads its offsets back.
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
    """SwiGLU networks of a rank's experts, stacked: (silu(x W_gate) * (x W_up)) W_down."""

    def __init__(self, config: ModelConfig, held: range, tensor_size: int) -> None:
        """Make this rank's part of the experts ``held``."""
        super().__init__()
        h, f = config.hidden_size, config.feed_forward_size
        self.num_held = len(held)
        self.gate_up = nn.Parameter(torch.empty(self.num_held * 2 * f // tensor_size, h))
        self.down = nn.Parameter(torch.empty(self.num_held * h, f // tensor_size))
        set_sharding(self.gate_up, ParameterSharding((2, f, h), shard_dim=1))
        set_sharding(self.down, ParameterSharding((h, f), shard_dim=1))
        mark_experts(self.gate_up, held)
        mark_experts(self.down, held)

    def forward(
        self, rows: torch.Tensor, counts: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Every expert on its run of rows; no collectives.

        Args:
            rows: [r, h], expert after expert.
            counts: [e] rows of each.
            weights: [r] what each row's output counts.

        Returns:
            [r, h]; with tensor parallelism this rank's part of the sum.
        """
        ends = counts.to(rows.device).cumsum(0).to(torch.int32)
        gate_up = self.gate_up.unflatten(0, (self.num_held, -1)).transpose(1, 2)
        down = self.down.unflatten(0, (self.num_held, -1)).transpose(1, 2)
        gate, up = F.grouped_mm(rows, gate_up, offs=ends).chunk(2, dim=-1)
        outputs = F.grouped_mm(F.silu(gate) * up, down, offs=ends)
        return outputs * weights.to(outputs.dtype)[:, None]


def _dispatcher_config(
    config: ModelConfig, linears: ParallelLinears, num_experts: int
) -> TransformerConfig:
    """What the dispatcher reads of a configuration; no layer is built from it."""
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_moe_experts=num_experts,
        moe_ffn_hidden_size=config.feed_forward_size,
        # Any number makes it count the rows, rather than take k times as many as came in.
        moe_expert_capacity_factor=1.0,
        moe_token_dispatcher_type="alltoall",
        cuda_graph_scope=[],  # its default warns of itself
        add_bias_linear=False,
        tensor_model_parallel_size=linears.groups.tensor_size,
        sequence_parallel=linears.sequence_parallel,
        params_dtype=linears.dtype,
        use_cpu_initialization=True,
    )
