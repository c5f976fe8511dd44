"""Routers: which experts of its tower a token runs through, and with what weight.

Expert choice (arXiv 2202.09368): the experts choose. Of the N tokens of a pool every expert takes
the k = ceil(c N / E) with its largest scores, and its output counts with the gate's value. What is
chosen depends on later tokens too, so for generation there is a second, causal router (arXiv
2407.21770), which learns to predict the choices and changes nothing else. Top-k: each token takes
its k best experts, by megatron's functions.

The pool of a router is what one rank, with its tensor-parallel peers, holds of the tower's tokens
in one micro-batch. Letters: n rows of this rank, E experts, h hidden size.
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
    switch_load_balancing_loss_func,
    topk_routing_with_score_function,
)
from torch import nn

from mot_megatron.config import ExpertsConfig, ModelConfig
from mot_megatron.errors import ConfigError
from mot_megatron.model.sharding import ParameterSharding, mark_auxiliary, set_sharding


@dataclass(frozen=True)
class RoutingPool:
    """A tower's tokens of one micro-batch."""

    filled: torch.Tensor
    """[n] bool: rows of this rank that hold a document's token; the others are never routed."""
    num_tokens: int
    """N, over this rank and its tensor-parallel peers."""


def routing_pools(
    towers: Sequence[int], filled: Sequence[torch.Tensor], tower_filled: Sequence[int]
) -> tuple[RoutingPool, ...]:
    """A pool for each of ``towers``.

    Args:
        towers: Those that this rank holds.
        filled: Their rows, in their order.
        tower_filled: The tokens of every tower of the model, K of them.
    """
    return tuple(
        RoutingPool(rows, tower_filled[tower]) for tower, rows in zip(towers, filled, strict=True)
    )


class Routing(NamedTuple):
    """Where a pool's rows go; a tuple, as ZeRO-3 looks for tensors in nothing else."""

    weights: torch.Tensor
    """[n, E] fp32: what an expert's output counts; zero where the row does not go."""
    assigned: torch.Tensor
    """[n, E] bool."""
    chosen: torch.Tensor | None = None
    """[E, k] rows by expert, ascending, where their number is known on the host; else None."""


@dataclass
class ExpertUse:
    """How many experts the tokens of a tower ran through on this rank, summed over its layers."""

    tokens: int = 0
    taken: int = 0
    """Pairs of a token and an expert that took it."""
    untaken: int = 0
    """Tokens that no expert took."""


@dataclass
class RoutingMode:
    """What all routers of a model are told from outside; one object for all of them."""

    token_weights: tuple[float, ...]
    """Per tower: one over its tokens in the global batch, by which sums of auxiliary losses become
    means; times what the engine multiplies the loss with."""
    causal: bool = False
    """Whether nothing may depend on later tokens: causal routers stand in for expert choice, and
    no capacity makes an expert drop tokens."""
    use: dict[int, ExpertUse] | None = None
    """By tower, while somebody counts, which waits for the device; else None."""


@dataclass
class RoutingStatistics:
    """Sums over the micro-batches of an interval, kept on the device: reading them waits for it."""

    num_experts: int
    values: torch.Tensor | None = field(default=None, repr=False)

    NAMES = ("tokens", "untaken", "entropy", "aux_loss", "z_loss", "causal_loss", "causal_agreed")
    """tokens: of documents; untaken: those that no expert took; entropy: of softmax(logits), in
    nats; losses: sums over tokens before their coefficients; causal_agreed: pairs of a token and an
    expert of which the causal router is right. Behind them E counts of tokens per expert."""

    def add(self, sums: dict[str, torch.Tensor], tokens_per_expert: torch.Tensor) -> None:
        """Add the sums of one micro-batch; a name that is absent adds nothing."""
        zero = tokens_per_expert.new_zeros(())
        ordered = [sums.get(name, zero).detach() for name in self.NAMES]
        new = torch.cat((torch.stack(ordered), tokens_per_expert))
        self.values = new if self.values is None else self.values + new

    def take(self, device: torch.device) -> torch.Tensor:
        """[7 + E] fp32 sums since the last time, in the order of NAMES, on ``device``."""
        values, self.values = self.values, None
        if values is None:
            return torch.zeros(len(self.NAMES) + self.num_experts, device=device)
        return values


class Router(nn.Module):
    """Logits of every row; what becomes of them is the subclasses'.

    Under sequence parallelism every rank has a part of the rows, so the weights' gradients are
    all-reduced over tensor parallelism in backward.
    """

    def __init__(
        self,
        config: ExpertsConfig,
        hidden_size: int,
        tower: int,
        mode: RoutingMode,
        pool_group: dist.ProcessGroup | None,
    ) -> None:
        """Make the router of one layer; ``pool_group`` are the ranks that hold parts of a pool."""
        super().__init__()
        self.settings = config
        self.tower = tower
        self.mode = mode
        self.pool_group = pool_group
        self.statistics = RoutingStatistics(config.num_moe_experts)
        self.weight = nn.Parameter(torch.empty(config.num_moe_experts, hidden_size))
        set_sharding(self.weight, ParameterSharding((config.num_moe_experts, hidden_size)))
        self.causal = CausalRouter(self, hidden_size) if config.causal_router else None

    def forward(self, x: torch.Tensor, pool: RoutingPool) -> Routing:
        """[n, h] -> the routing of its rows; collectives as ``route``."""
        routing = self.route(x, pool)
        if self.mode.use is not None:
            use = self.mode.use.setdefault(self.tower, ExpertUse())
            use.tokens += int(pool.filled.sum())
            use.taken += int(routing.assigned.sum())
            use.untaken += int((pool.filled & ~routing.assigned.any(-1)).sum())
        return routing

    def route(self, x: torch.Tensor, pool: RoutingPool) -> Routing:
        """[n, h] -> the routing of its rows."""
        raise NotImplementedError

    def whole(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight, such that its gradient becomes the sum over the ranks of the pool."""
        if self.pool_group is None:
            return weight
        return copy_to_tensor_model_parallel_region(weight, group=self.pool_group)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """[n, h] -> [n, E] fp32: rounding must not decide which expert a token goes to."""
        return F.linear(x.float(), self.whole(self.weight).float())

    def gate(self, logits: torch.Tensor) -> torch.Tensor:
        """What an expert's output counts, [n, E] -> [n, E]."""
        if self.settings.gate == "sigmoid":
            return torch.sigmoid(logits)
        return torch.softmax(logits, dim=-1)

    def over_pool(self, counts: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks of the pool; one small all-reduce, none without such ranks."""
        if self.pool_group is not None:
            dist.all_reduce(counts, group=self.pool_group)
        return counts

    def largest_of_pool(
        self, scores: torch.Tensor, k: int
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The ``k`` rows of the pool with the largest scores, for every expert.

        One all-gather of [N, E] scores over the ranks of the pool.

        Args:
            scores: [n, E], without gradient.
            k: At most the rows of the pool.

        Returns:
            The rows by expert [E, k], ascending, None where other ranks have some of them; and
            [n, E] bool.
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
        """Let backward through ``routing`` also be backward of auxiliary losses; keep statistics.

        Args:
            routing: Of the pool.
            logits: [n, E].
            pool: The rows.
            losses: Sums over this rank's tokens by name, without coefficients; z-loss is added.
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
    """Every expert takes the same number of the pool's tokens."""

    def route(self, x: torch.Tensor, pool: RoutingPool) -> Routing:
        """[n, h] -> its routing; over the pool's ranks one all-gather of [N, E] logits."""
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
        settings = self.settings
        wanted = settings.experts_per_token * pool.num_tokens / settings.num_moe_experts
        scores = self._scores(logits).masked_fill(~pool.filled[:, None], -math.inf)
        return self.largest_of_pool(scores, min(pool.num_tokens, _rounded_up(wanted)))

    def _scores(self, logits: torch.Tensor) -> torch.Tensor:
        """By what experts choose: softmax compares a token's experts first, sigmoid does not."""
        if self.settings.gate == "sigmoid":
            return logits  # in the same order as sigmoid(logits), without its rounding at the ends
        return torch.softmax(logits, dim=-1)

    def _causal_loss(self, x: torch.Tensor, routing: Routing, pool: RoutingPool) -> torch.Tensor:
        """Sum over tokens of the mean over experts of the binary cross entropy."""
        assert self.causal is not None
        predicted, target = self.causal(x.detach()), routing.assigned.float()
        each = F.binary_cross_entropy_with_logits(predicted, target, reduction="none")
        agreed = ((predicted.detach() > 0) == routing.assigned) & pool.filled[:, None]
        self.statistics.add(
            {"causal_agreed": agreed.sum().float()}, torch.zeros_like(target[:1].sum(0))
        )
        return (each.mean(-1) * pool.filled).sum()


class CausalRouter(nn.Module):
    """Predicts from a token alone which experts will choose it: SiLU(x W1) W2."""

    def __init__(self, router: Router, hidden_size: int) -> None:
        """Make it for ``router``, which it does not own."""
        super().__init__()
        num_experts = router.settings.num_moe_experts
        self._whole = router.whole
        self.hidden = nn.Parameter(torch.empty(hidden_size // 2, hidden_size))
        self.output = nn.Parameter(torch.empty(num_experts, hidden_size // 2))
        set_sharding(self.hidden, ParameterSharding((hidden_size // 2, hidden_size)))
        set_sharding(self.output, ParameterSharding((num_experts, hidden_size // 2)))
        mark_auxiliary(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, h] -> logits [n, E] fp32; above zero an expert is expected to choose the token."""
        hidden = F.silu(F.linear(x, self._whole(self.hidden)))
        return F.linear(hidden, self._whole(self.output)).float()


class TopKRouter(Router):
    """Every token takes its k best experts; an expert may drop what exceeds its capacity."""

    def route(self, x: torch.Tensor, pool: RoutingPool) -> Routing:
        """[n, h] -> its routing.

        Over the pool's ranks one all-reduce of counts for the balancing loss, and with a capacity
        one all-gather of [N, E] weights. Of the tokens above its capacity an expert drops those
        with the smallest weights.
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
            share = pool.num_tokens * k / settings.num_moe_experts
            capacity = min(pool.num_tokens, _rounded_up(settings.capacity_factor * share))
            _, kept = self.largest_of_pool(weights.detach(), capacity)
            weights, assigned = weights * kept, assigned & kept
        return self.with_losses(Routing(weights, assigned), logits, pool, losses)

    def _balancing_loss(
        self, logits: torch.Tensor, assigned: torch.Tensor, pool: RoutingPool
    ) -> torch.Tensor:
        """The Switch Transformer's loss times N, this rank's part of the sum over the pool."""
        settings = self.settings
        scores = torch.softmax(logits, dim=-1) * pool.filled[:, None]
        loss = switch_load_balancing_loss_func(
            probs=scores,
            tokens_per_expert=self.over_pool(assigned.sum(0).float()),
            total_num_tokens=max(pool.num_tokens, 1),
            topk=settings.topk or 1,
            num_experts=settings.num_moe_experts,
            moe_aux_loss_coeff=1.0,
        )
        return loss * pool.num_tokens


def check_can_be_causal(model: ModelConfig) -> None:
    """Refuse a model that can only route tokens by looking at later ones.

    Raises:
        ConfigError: a tower's experts choose their tokens, and no causal router stands in for them.
    """
    for name, experts in zip(model.tower_names, model.experts_of_towers, strict=True):
        if experts is not None and not experts.can_be_causal:
            raise ConfigError(
                f"model.towers.{name}.experts.causal_router = false: its experts choose among later"
                " tokens too, so the model cannot generate; needed, from the start of training:"
                f" model.towers.{name}.experts.causal_router = true"
            )


def _rounded_up(number: float) -> int:
    """Up to the next whole number, unless only a rounding error lies above the last."""
    return math.ceil(number - 1e-6)


def router_class(config: ExpertsConfig) -> type[Router]:
    """The router that a tower's configuration asks for."""
    return ExpertChoiceRouter if config.routing == "expert_choice" else TopKRouter
