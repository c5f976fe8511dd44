"""Routers select the experts of its tower that process a token, and their weights.

Expert choice (arXiv 2202.09368): each expert takes the k = ceil(c N / E) tokens of a pool of N
tokens with the largest scores, and the gate's value weights its output. The choice depends on later
tokens, so generation needs a second, causal router (arXiv 2407.21770) that learns to predict the
choices without influencing anything else. Top-k: each token takes its k best experts, through
megatron's functions.

A router's pool is the tower's tokens of one micro-batch that one rank and its tensor-parallel peers
hold. The balancing loss of top-k routing is computed per sequence instead, as DeepSeek-V3 (arXiv
2412.19437, section 2.1.2) does, because sequences are the same in every layout and pools are not.
Letters: n rows of this rank, N tokens of the pool, E experts, h hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    topk_routing_with_score_function,
)
from torch import nn

from mot_megatron.config_model import ExpertsConfig, ModelConfig
from mot_megatron.errors import ConfigError
from mot_megatron.model.micro_batch import MicroBatch
from mot_megatron.model.sharding import ParameterSharding, mark_auxiliary, set_sharding


@dataclass(frozen=True)
class RoutingPool:
    """The tokens of a tower in one micro-batch that are routed together."""

    filled: torch.Tensor
    """[n] bool: rows of this rank that hold a document's token; other rows are never routed."""
    num_tokens: int
    """N, summed over this rank and its tensor-parallel peers."""
    sequences: torch.Tensor
    """[n] int64: the sequence of each row, counted from 0 in the micro-batch."""
    num_sequences: int
    """Sequences of the micro-batch."""


def routing_pools(
    towers: Sequence[int],
    filled: Sequence[torch.Tensor],
    sequences: Sequence[torch.Tensor],
    micro_batch: MicroBatch,
) -> tuple[RoutingPool, ...]:
    """Build one routing pool per held tower.

    Args:
        towers: Indices of the towers that this rank holds.
        filled: Masks of their filled rows, in the same order.
        sequences: The sequences of their rows, likewise.
        micro_batch: The micro-batch that holds the rows.
    """
    return tuple(
        RoutingPool(rows, micro_batch.tower_filled[tower], of_rows, micro_batch.num_sequences)
        for tower, rows, of_rows in zip(towers, filled, sequences, strict=True)
    )


class Routing(NamedTuple):
    """The assignment of a pool's rows to experts; a tuple so that ZeRO-3 finds the tensors."""

    weights: torch.Tensor
    """[n, E] fp32: weight of each expert's output; zero where a row is not assigned."""
    assigned: torch.Tensor
    """[n, E] bool: whether an expert processes a row."""
    chosen: torch.Tensor | None = None
    """[E, k] rows of each expert, ascending, if the host knows their number; otherwise None."""


@dataclass
class ExpertUse:
    """Expert assignments of a tower's tokens on this rank, summed over its layers."""

    tokens: int = 0
    taken: int = 0
    """Pairs of a token and an expert that processed it."""
    untaken: int = 0
    """Tokens that no expert processed."""


@dataclass
class RoutingMode:
    """Settings that all routers of a model share and the training step changes."""

    token_weights: tuple[float, ...]
    """Per tower: loss factor of the engine / tokens of the tower in the global batch. It turns sums
    of auxiliary losses into means."""
    causal: bool = False
    """Whether routing must not depend on later tokens: causal routers replace expert choice, and
    no expert drops tokens over its capacity."""
    use: dict[int, ExpertUse] | None = None
    """Assignment counts by tower while they are collected, which synchronizes with the device."""


@dataclass
class RoutingStatistics:
    """Sums over the micro-batches of an interval, accumulated on the device."""

    num_experts: int
    values: torch.Tensor | None = field(default=None, repr=False)

    NAMES = ("tokens", "untaken", "entropy", "aux_loss", "z_loss", "causal_loss", "causal_agreed")
    """tokens: document tokens; untaken: tokens that no expert processed; entropy: of
    softmax(logits), in nats; losses: sums over tokens before their coefficients; causal_agreed:
    (token, expert) pairs that the causal router predicts correctly. E counts of tokens per expert
    follow."""

    def add(self, sums: dict[str, torch.Tensor], tokens_per_expert: torch.Tensor) -> None:
        """Add the sums of one micro-batch; absent names add nothing."""
        zero = tokens_per_expert.new_zeros(())
        ordered = [sums.get(name, zero).detach() for name in self.NAMES]
        new = torch.cat((torch.stack(ordered), tokens_per_expert))
        self.values = new if self.values is None else self.values + new

    def take(self, device: torch.device) -> torch.Tensor:
        """Return and reset the sums, [7 + E] fp32 in the order of NAMES, on ``device``."""
        values, self.values = self.values, None
        if values is None:
            return torch.zeros(len(self.NAMES) + self.num_experts, device=device)
        return values


class Router(nn.Module):
    """Base class of routers: it computes logits, and subclasses turn them into assignments.

    Under sequence parallelism each rank has a part of the rows, so backward all-reduces the
    weights' gradients over the tensor-parallel group.
    """

    def __init__(
        self,
        config: ExpertsConfig,
        hidden_size: int,
        tower: int,
        mode: RoutingMode,
        pool_group: dist.ProcessGroup | None,
        balancing_group: dist.ProcessGroup | None,
    ) -> None:
        """Build the router of one layer.

        Args:
            config: The tower's experts.
            hidden_size: h.
            tower: Index of the tower.
            mode: Settings shared by all routers of the model.
            pool_group: The ranks that share a pool; None if this rank has it alone.
            balancing_group: The ranks that hold the tower's tokens of the same sequences; None if
                this rank has them alone.
        """
        super().__init__()
        self.settings = config
        self.tower = tower
        self.mode = mode
        self.pool_group = pool_group
        self.balancing_group = balancing_group
        self.statistics = RoutingStatistics(config.num_moe_experts)
        self.weight = nn.Parameter(torch.empty(config.num_moe_experts, hidden_size))
        set_sharding(self.weight, ParameterSharding((config.num_moe_experts, hidden_size)))
        self.causal = CausalRouter(self, hidden_size) if config.causal_router else None

    def forward(self, x: torch.Tensor, pool: RoutingPool) -> Routing:
        """Route the rows [n, h], counting assignments on request; collectives as in ``route``."""
        routing = self.route(x, pool)
        if self.mode.use is not None:
            use = self.mode.use.setdefault(self.tower, ExpertUse())
            use.tokens += int(pool.filled.sum())
            use.taken += int(routing.assigned.sum())
            use.untaken += int((pool.filled & ~routing.assigned.any(-1)).sum())
        return routing

    def route(self, x: torch.Tensor, pool: RoutingPool) -> Routing:
        """Route the rows [n, h]."""
        raise NotImplementedError

    def whole(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight so that backward sums its gradient over the ranks of the pool."""
        if self.pool_group is None:
            return weight
        return copy_to_tensor_model_parallel_region(weight, group=self.pool_group)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Compute logits [n, h] -> [n, E] in fp32, so that rounding decides no assignment."""
        return F.linear(x.float(), self.whole(self.weight).float())

    def gate(self, logits: torch.Tensor) -> torch.Tensor:
        """Turn logits into weights of the experts' outputs, [n, E] -> [n, E]."""
        if self.settings.gate == "sigmoid":
            return torch.sigmoid(logits)
        return torch.softmax(logits, dim=-1)

    def largest_of_pool(
        self, scores: torch.Tensor, k: int
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Find, for every expert, the ``k`` rows of the pool with the largest scores.

        Collectives: one all-gather of [N, E] scores over the ranks of the pool, if several.

        Args:
            scores: [n, E], without gradient.
            k: At most the number of rows in the pool.

        Returns:
            The rows of each expert [E, k], ascending, or None if several ranks share the pool; and
            the assignment of this rank's rows, [n, E] bool.
        """
        own, group = slice(0, len(scores)), self.pool_group
        if group is not None:
            parts = [torch.empty_like(scores) for _ in range(group.size())]
            dist.all_gather(parts, scores.contiguous(), group=group)
            first = len(scores) * group.rank()
            own, scores = slice(first, first + len(scores)), torch.cat(parts)
        rows = scores.topk(k, dim=0).indices
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(0, rows, value=True)[own]
        return (rows.sort(dim=0).values.T if group is None else None), chosen

    def with_losses(
        self,
        routing: Routing,
        logits: torch.Tensor,
        pool: RoutingPool,
        losses: dict[str, torch.Tensor],
    ) -> Routing:
        """Attach auxiliary losses to ``routing`` for backward, and add to the statistics.

        Args:
            routing: The pool's routing.
            logits: [n, E].
            pool: The routed rows.
            losses: Sums over this rank's tokens by name, without coefficients. The z-loss is added
                here.
        """
        if not torch.is_grad_enabled():
            return routing
        settings, filled = self.settings, pool.filled
        log_z = torch.logsumexp(logits, dim=-1)
        losses = {**losses, "z_loss": (log_z.square() * filled).sum()}
        coefficients = {
            "aux_loss": settings.aux_loss_coefficient,
            "z_loss": settings.z_loss_coefficient,
            "causal_loss": 1.0,
        }
        weights = routing.weights
        for name, loss in losses.items():
            if coefficients[name] > 0:
                scale = coefficients[name] * self.mode.token_weights[self.tower]
                weights = MoEAuxLossAutoScaler.apply(weights, loss * scale)
        self._count(routing, logits, log_z, pool, losses)
        return Routing(weights, routing.assigned, routing.chosen)

    @torch.no_grad()
    def _count(
        self,
        routing: Routing,
        logits: torch.Tensor,
        log_z: torch.Tensor,
        pool: RoutingPool,
        losses: dict[str, torch.Tensor],
    ) -> None:
        filled, assigned = pool.filled, routing.assigned
        # H(softmax(z)) = log Z - sum p z.
        entropy = log_z - (torch.softmax(logits, dim=-1) * logits).sum(-1)
        sums = {
            "tokens": filled.sum().float(),
            "untaken": (filled & ~assigned.any(-1)).sum().float(),
            "entropy": (entropy * filled).sum(),
            **losses,
        }
        self.statistics.add(sums, assigned.sum(0).float())


class ExpertChoiceRouter(Router):
    """Expert choice: every expert takes the same number of the pool's tokens."""

    def route(self, x: torch.Tensor, pool: RoutingPool) -> Routing:
        """Route the rows [n, h]; one all-gather of [N, E] logits over the ranks of the pool."""
        logits = self.logits(x)
        if self.mode.causal:
            assert self.causal is not None, "refused where a model is made to route causally"
            assigned = (self.causal(x) > 0) & pool.filled[:, None]
            return Routing(self.gate(logits) * assigned, assigned)
        chosen, assigned = self._choose(logits.detach(), pool)
        routing = Routing(self.gate(logits) * assigned, assigned, chosen)
        losses = {}
        if self.causal is not None and torch.is_grad_enabled():
            losses["causal_loss"] = self._causal_loss(x, routing, pool)
        return self.with_losses(routing, logits, pool, losses)

    def _choose(
        self, logits: torch.Tensor, pool: RoutingPool
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        scores = self._scores(logits).masked_fill(~pool.filled[:, None], -math.inf)
        share = self.settings.experts_per_token
        return self.largest_of_pool(scores, expert_rows(self.settings, pool.num_tokens, share))

    def _scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the scores by which experts choose: softmax over a token's experts, or logits."""
        if self.settings.gate == "sigmoid":
            return logits  # same order as sigmoid(logits), without saturation
        return torch.softmax(logits, dim=-1)

    def _causal_loss(self, x: torch.Tensor, routing: Routing, pool: RoutingPool) -> torch.Tensor:
        """Sum the binary cross entropy over tokens, averaged over experts."""
        assert self.causal is not None
        predicted, target = self.causal(x.detach()), routing.assigned.float()
        each = F.binary_cross_entropy_with_logits(predicted, target, reduction="none")
        agreed = ((predicted.detach() > 0) == routing.assigned) & pool.filled[:, None]
        self.statistics.add(
            {"causal_agreed": agreed.sum().float()}, torch.zeros_like(target[:1].sum(0))
        )
        return (each.mean(-1) * pool.filled).sum()


class CausalRouter(nn.Module):
    """A predictor, from a token alone, of the experts that will choose it: SiLU(x W1) W2."""

    def __init__(self, router: Router, hidden_size: int) -> None:
        """Build the predictor for ``router``; it holds no reference to the router's parameters."""
        super().__init__()
        num_experts = router.settings.num_moe_experts
        self._whole = router.whole
        self.hidden = nn.Parameter(torch.empty(hidden_size // 2, hidden_size))
        self.output = nn.Parameter(torch.empty(num_experts, hidden_size // 2))
        set_sharding(self.hidden, ParameterSharding((hidden_size // 2, hidden_size)))
        set_sharding(self.output, ParameterSharding((num_experts, hidden_size // 2)))
        mark_auxiliary(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Predict logits, [n, h] -> [n, E] fp32; a positive logit means that the expert chooses."""
        hidden = F.silu(F.linear(x, self._whole(self.hidden)))
        return F.linear(hidden, self._whole(self.output)).float()


class TopKRouter(Router):
    """Top-k: every token takes its k best experts; an expert may drop tokens over its capacity."""

    def route(self, x: torch.Tensor, pool: RoutingPool) -> Routing:
        """Route the rows [n, h].

        An expert over its capacity drops the tokens with the smallest weights. Collectives: one
        all-reduce of counts over the balancing group for the balancing loss, and one all-gather of
        [N, E] weights over the ranks of the pool if there is a capacity.
        """
        settings, k = self.settings, self.settings.topk or 1
        logits = self.logits(x)
        weights, assigned = topk_routing_with_score_function(
            logits, k, score_function=settings.gate, use_pre_softmax=settings.gate == "softmax"
        )
        filled = pool.filled[:, None]
        weights, assigned = weights * filled, assigned & filled
        losses = {}
        if settings.aux_loss_coefficient > 0 and torch.is_grad_enabled():
            losses["aux_loss"] = self._balancing_loss(logits, assigned, pool)
        if settings.capacity_factor is not None and not self.mode.causal:
            capacity = expert_rows(settings, pool.num_tokens, settings.capacity_factor * k)
            _, kept = self.largest_of_pool(weights.detach(), capacity)
            weights, assigned = weights * kept, assigned & kept
        return self.with_losses(Routing(weights, assigned), logits, pool, losses)

    def _balancing_loss(
        self, logits: torch.Tensor, assigned: torch.Tensor, pool: RoutingPool
    ) -> torch.Tensor:
        """Sum this rank's part of N_s E sum_e f_e P_e over the sequences of the micro-batch.

        N_s is the number of the tower's tokens in the sequence, f_e the fraction of their choices
        that is expert e, before any is dropped, and P_e their mean softmax probability of e
        (arXiv 2101.03961, equation 4, for each sequence).
        """
        counts = logits.new_zeros(pool.num_sequences, self.settings.num_moe_experts)
        counts.index_add_(0, pool.sequences, assigned.to(counts.dtype))
        if self.balancing_group is not None:
            dist.all_reduce(counts, group=self.balancing_group)
        fractions = counts / counts.sum(-1, keepdim=True).clamp(min=1)
        scores = torch.softmax(logits, dim=-1) * pool.filled[:, None]
        return self.settings.num_moe_experts * (scores * fractions[pool.sequences]).sum()


def check_can_be_causal(model: ModelConfig) -> None:
    """Check that every tower can route tokens without looking at later ones.

    Raises:
        ConfigError: A tower uses expert choice without a causal router.
    """
    for name, experts in zip(model.tower_names, model.experts_of_towers, strict=True):
        if experts is not None and not experts.can_be_causal:
            raise ConfigError(
                f"model.towers.{name}.experts.causal_router = false: its experts choose among later"
                " tokens too, so the model cannot generate; needed, from the start of training:"
                f" model.towers.{name}.experts.causal_router = true"
            )


def expert_rows(settings: ExpertsConfig, num_tokens: int, per_token: float) -> int:
    """Return how many of a pool's tokens an expert takes if each token has ``per_token`` experts.

    Rounded up, ignoring a rounding error just above a whole number, and at most all of them.
    """
    rows = per_token * num_tokens / settings.num_moe_experts
    return min(num_tokens, math.ceil(rows - 1e-6))


def router_class(config: ExpertsConfig) -> type[Router]:
    """Return the router class for a tower's configuration."""
    return ExpertChoiceRouter if config.routing == "expert_choice" else TopKRouter
