"""Literal, slow mixtures of experts: the reference for routers and grouped matmuls.

They loop over experts and tokens in one process, straight from the formulas. Letters: n rows of the
pool (tokens and padding), E experts, h hidden size, f feed-forward width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from mot_megatron.config_model import ExpertsConfig


@dataclass
class LiteralExperts:
    """Weights of a mixture of experts, whose gradients the tests compare."""

    router: torch.Tensor
    """[E, h]."""
    gate_up: list[torch.Tensor]
    """E times [2 * f, h]."""
    down: list[torch.Tensor]
    """E times [h, f]."""
    causal_hidden: torch.Tensor
    """[h / 2, h]."""
    causal_output: torch.Tensor
    """[E, h / 2]."""

    @classmethod
    def random(cls, seed: int, num_experts: int, hidden: int, ffn: int) -> LiteralExperts:
        """Draw random weights that require gradients."""
        generator = torch.Generator().manual_seed(seed)

        def weight(*shape: int) -> torch.Tensor:
            return (torch.randn(shape, generator=generator) * 0.4).requires_grad_()

        return cls(
            weight(num_experts, hidden),
            [weight(2 * ffn, hidden) for _ in range(num_experts)],
            [weight(hidden, ffn) for _ in range(num_experts)],
            weight(hidden // 2, hidden),
            weight(num_experts, hidden // 2),
        )

    def gradients(self) -> dict[str, torch.Tensor]:
        """Return gradients by the names used in ``ExpertFeedForward``, one entry per expert."""
        named = {
            "router.weight": self.router,
            "router.causal.hidden": self.causal_hidden,
            "router.causal.output": self.causal_output,
            **{f"experts.{e}.gate_up": weight for e, weight in enumerate(self.gate_up)},
            **{f"experts.{e}.down": weight for e, weight in enumerate(self.down)},
        }
        return {
            name: torch.zeros_like(weight) if weight.grad is None else weight.grad
            for name, weight in named.items()
        }

    def expert(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """Apply one expert, [h] -> [h]: W_down (silu(W_gate x) * (W_up x))."""
        gate, up = (self.gate_up[number] @ x).chunk(2)
        return self.down[number] @ (gate * torch.sigmoid(gate) * up)


@dataclass
class Outcome:
    """What a mixture computes for one pool."""

    outputs: torch.Tensor
    """[n, h]."""
    chosen: list[list[int]]
    """The rows that each expert takes, ascending."""
    losses: dict[str, torch.Tensor] = field(default_factory=dict)
    """Sums over tokens, without coefficients."""


def expert_choice(
    weights: LiteralExperts, settings: ExpertsConfig, x: torch.Tensor, filled: list[bool]
) -> Outcome:
    """Route by expert choice: S = gate(X W_g), k = n c / E, (G, I) = TopK(S^T, k).

    The output of token l is the sum of G * expert(x_l) over the experts that took it.
    """
    tokens = [row for row, used in enumerate(filled) if used]
    num_experts = settings.num_moe_experts
    k = math.ceil(round(len(tokens) * (settings.capacity_factor or 1.0) / num_experts, 9))
    scores = {row: _gate(settings, weights.router @ x[row]) for row in tokens}
    outputs = [torch.zeros_like(x[row]) for row in range(len(x))]
    chosen = []
    for expert in range(num_experts):
        by_score = sorted(tokens, key=lambda row: -scores[row][expert].item())
        chosen.append(sorted(by_score[:k]))
        for row in chosen[expert]:
            outputs[row] = outputs[row] + scores[row][expert] * weights.expert(expert, x[row])
    outcome = Outcome(_stacked(outputs, x), chosen)
    outcome.losses["z_loss"] = _z_loss(weights, x, tokens)
    outcome.losses["causal_loss"] = _causal_loss(weights, x, tokens, chosen)
    return outcome


def top_k(
    weights: LiteralExperts,
    settings: ExpertsConfig,
    x: torch.Tensor,
    filled: list[bool],
    sequences: list[int],
) -> Outcome:
    """Route by top-k: every token takes its k highest-scoring experts.

    An expert at capacity keeps the tokens with the largest weights. The balancing loss is computed
    for each of the ``sequences`` of the rows.
    """
    tokens = [row for row, used in enumerate(filled) if used]
    num_experts, k = settings.num_moe_experts, settings.topk or 1
    best: dict[int, dict[int, torch.Tensor]] = {}
    for row in tokens:
        scores = _gate(settings, weights.router @ x[row])
        experts = sorted(range(num_experts), key=lambda e: -scores[e].item())[:k]
        # With several sigmoid gates, megatron normalizes a token's weights to sum to 1.
        shares = settings.gate == "sigmoid" and k > 1
        divisor = sum(scores[e] for e in experts) if shares else 1.0
        best[row] = {e: scores[e] / divisor for e in experts}
    capacity = len(tokens)
    if settings.capacity_factor is not None:
        capacity = math.ceil(round(settings.capacity_factor * len(tokens) * k / num_experts, 9))
    outputs = [torch.zeros_like(x[row]) for row in range(len(x))]
    chosen = []
    for expert in range(num_experts):
        wanting = [row for row in tokens if expert in best[row]]
        wanting.sort(key=lambda row: -best[row][expert].item())
        chosen.append(sorted(wanting[:capacity]))
        for row in chosen[expert]:
            outputs[row] = outputs[row] + best[row][expert] * weights.expert(expert, x[row])
    outcome = Outcome(_stacked(outputs, x), chosen)
    outcome.losses["z_loss"] = _z_loss(weights, x, tokens)
    outcome.losses["aux_loss"] = torch.zeros(()) + sum(
        _balancing_loss(weights, x, [row for row in tokens if sequences[row] == sequence], best, k)
        for sequence in set(sequences)
    )
    return outcome


def _gate(settings: ExpertsConfig, logits: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(logits) if settings.gate == "sigmoid" else torch.softmax(logits, 0)


def _stacked(outputs: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return torch.stack(outputs) if outputs else torch.zeros_like(x)


def _z_loss(weights: LiteralExperts, x: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """Return the sum over tokens of (log sum exp z)^2."""
    squares = [torch.logsumexp(weights.router @ x[row], 0) ** 2 for row in tokens]
    return torch.stack([*squares, torch.zeros(())]).sum()


def _balancing_loss(
    weights: LiteralExperts,
    x: torch.Tensor,
    tokens: list[int],
    best: dict[int, dict[int, torch.Tensor]],
    k: int,
) -> torch.Tensor:
    """Return N E sum_e f_e P_e: f_e is e's fraction of the choices, P_e its mean softmax."""
    total, num_experts = torch.zeros(()), len(weights.router)
    for expert in range(num_experts):
        count = sum(expert in best[row] for row in tokens)
        for row in tokens:
            probability = torch.softmax(weights.router @ x[row], 0)[expert]
            total = total + num_experts * count / (k * len(tokens)) * probability
    return total


def _causal_loss(
    weights: LiteralExperts, x: torch.Tensor, tokens: list[int], chosen: list[list[int]]
) -> torch.Tensor:
    """Return the sum over tokens of the mean over experts of the binary cross entropy."""
    total = torch.zeros(())
    for row in tokens:
        inner = weights.causal_hidden @ x[row].detach()
        logits = weights.causal_output @ (inner * torch.sigmoid(inner))
        for expert, rows in enumerate(chosen):
            p = torch.sigmoid(logits[expert])
            total = total - torch.log(p if row in rows else 1 - p) / len(chosen)
    return total
