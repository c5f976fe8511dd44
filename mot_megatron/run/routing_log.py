"""What the routers of a run do, per tower and layer: points and heat maps for TensorBoard.

Routers sum up on their devices; the sums of all ranks meet once per report. Every token's row lies
on one rank, so that they add up to the global batch's, wherever routers and experts are copied to.

Letters: X towers with experts, L layers, E experts of a tower (the most that any has, in tables).
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from mot_megatron.config import ExpertsConfig, ModelConfig
from mot_megatron.model.model import MixtureOfTransformers
from mot_megatron.model.routing import Router, RoutingStatistics
from mot_megatron.run.metrics import Charts, TensorBoardLog
from mot_megatron.run.routing_heat_map import draw_heat_map

_NAMES = RoutingStatistics.NAMES


class RoutingLog:
    """Collects the statistics of a model's routers; every rank has one and calls it alike."""

    def __init__(self, model: MixtureOfTransformers) -> None:
        config = model.config
        self._device = model.groups.device
        self._towers = _towers_with_experts(config)
        positions = {tower: position for position, (tower, _, _) in enumerate(self._towers)}
        self._routers = [
            (positions[module.tower], int(layer), module)
            for layer, modules in model.layers.items()
            for module in modules.modules()
            if isinstance(module, Router)
        ]
        widest = max(experts.num_moe_experts for _, _, experts in self._towers)
        shape = (len(self._towers), config.num_layers, len(_NAMES) + widest)
        self._unreported = torch.zeros(shape, dtype=torch.float64)
        self._undrawn = torch.zeros(shape, dtype=torch.float64)

    def report(self, log: TensorBoardLog | None, step: int) -> None:
        """Write what routers did since the last report; one all-reduce over the world.

        Args:
            log: Where to; None on the ranks that write nothing.
            step: Steps done.
        """
        self._gather()
        if log:
            for (_, name, experts), of_tower in zip(self._towers, self._unreported, strict=True):
                for layer, sums in enumerate(of_tower):
                    prefix = layer_tag(name, layer)
                    values = layer_scalars(experts, sums)
                    log.log_scalars({f"{prefix}/{key}": values[key] for key in values}, step)
        self._unreported.zero_()

    def draw(self, log: TensorBoardLog | None, step: int) -> None:
        """Draw what experts took since the last drawing; one all-reduce over the world.

        Args:
            log: Where to; None on the ranks that write nothing.
            step: Steps done.
        """
        self._gather()
        if log:
            for (_, name, experts), sums in zip(self._towers, self._undrawn, strict=True):
                tokens = sums[:, _NAMES.index("tokens")]
                if tokens.any():  # all layers of a tower see the same tokens
                    percent = 100 * sums / tokens[:, None]
                    untaken = percent[:, _NAMES.index("untaken")].numpy()
                    figure = draw_heat_map(
                        f"{name} tower, {_routing_in_words(experts)}",
                        percent[:, len(_NAMES) :][:, : experts.num_moe_experts].numpy(),
                        untaken if experts.sees_the_future else None,
                        100 * experts.experts_per_token / experts.num_moe_experts,
                    )
                    log.log_figure(f"routing/{name}/heat_map", figure, step)
        self._undrawn.zero_()

    def _gather(self) -> None:
        """Take the sums of all ranks' routers to the host; waits for the device."""
        table = self._unreported.new_zeros(self._unreported.shape, device=self._device)
        for tower, layer, router in self._routers:
            sums = router.statistics.take(self._device)
            table[tower, layer, : len(sums)] = sums
        dist.all_reduce(table)
        table = table.cpu()
        self._unreported += table
        self._undrawn += table


def layer_scalars(experts: ExpertsConfig, sums: torch.Tensor) -> dict[str, float]:
    """Means over the tokens of one tower and layer, of what its routing knows.

    Args:
        experts: The tower's.
        sums: [7 + E or more], as in ``RoutingStatistics``, of all ranks.

    Returns:
        By name; nothing where there was no token.
    """
    number = experts.num_moe_experts
    tokens, *means = sums.tolist()
    if tokens == 0:
        return {}
    named = dict(zip(_NAMES[1:], (value / tokens for value in means), strict=False))
    shares = means[len(_NAMES) - 1 :][:number]
    scalars = {
        "untaken_percent": 100 * named["untaken"],
        "entropy_nats": named["entropy"],
        "aux_loss": named["aux_loss"],
        "z_loss": named["z_loss"],
        "causal_loss": named["causal_loss"],
        "causal_agreement_percent": 100 * named["causal_agreed"] / number,
    }
    known = {name: scalars[name] for name in _scalar_names(experts)}
    for expert, count in enumerate(shares):
        known[f"tokens_percent_expert_{expert:02}"] = 100 * count / tokens
    return known


def expert_charts(model: ModelConfig) -> Charts:
    """Return one chart per scalar, of all layers of all towers with experts."""
    titles = {
        "untaken_percent": "percent of tokens that no expert takes",
        "entropy_nats": "entropy of the router, nats per token",
        "aux_loss": "load-balancing loss (1: perfectly even)",
        "causal_loss": "loss of the causal router, nats per token and expert",
        "causal_agreement_percent": "percent of (token, expert) that the causal router gets right",
    }
    known = {
        name for _, _, experts in _towers_with_experts(model) for name in _scalar_names(experts)
    }
    return {
        title: ["Multiline", [f"routing/.*/{scalar}$"]]
        for scalar, title in titles.items()
        if scalar in known
    }


def layer_tag(tower: str, layer: int) -> str:
    """What tags of a tower's layer begin with."""
    return f"routing/{tower}/layer_{layer:02}"


def _towers_with_experts(model: ModelConfig) -> list[tuple[int, str, ExpertsConfig]]:
    """Index, name and experts of each."""
    pairs = zip(model.tower_names, model.experts_of_towers, strict=True)
    return [(tower, name, experts) for tower, (name, experts) in enumerate(pairs) if experts]


def _scalar_names(experts: ExpertsConfig) -> list[str]:
    """What there is to know of a tower's routing, besides the tokens of every expert."""
    there = {
        # Experts that look among later tokens leave some to none.
        "untaken_percent": experts.sees_the_future,
        "entropy_nats": True,
        "aux_loss": experts.aux_loss_coefficient > 0,
        "z_loss": experts.z_loss_coefficient > 0,
        "causal_loss": experts.causal_router,
        "causal_agreement_percent": experts.causal_router,
    }
    return [name for name, known in there.items() if known]


def _routing_in_words(experts: ExpertsConfig) -> str:
    if experts.routing == "topk":
        return f"top-{experts.topk or 1} routing"
    return f"expert choice, c = {experts.experts_per_token:g}"
