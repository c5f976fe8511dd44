"""Statistics of the routers of a run, per tower and layer, as scalars and heat maps.

Routers accumulate sums on their devices, which are all-reduced once per report. Each token is
counted on exactly one rank, so the totals are those of the global batch in any layout.

Letters: X towers with experts, L layers, E experts of a tower (in tables, the largest of any).
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from mot_megatron.config_model import ExpertsConfig, ModelConfig
from mot_megatron.model.model import MixtureOfTransformers
from mot_megatron.model.routing import Router, RoutingStatistics
from mot_megatron.run.metrics import Charts, TensorBoardLog
from mot_megatron.run.routing_heat_map import draw_heat_map

_NAMES = RoutingStatistics.NAMES


class RoutingLog:
    """Collects the statistics of a model's routers; every rank makes the same calls."""

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
        # Sums over all ranks since the last report and since the last drawing.
        self._unreported = torch.zeros(shape, dtype=torch.float64)
        self._undrawn = torch.zeros(shape, dtype=torch.float64)

    def report(self, log: TensorBoardLog | None, step: int) -> None:
        """Write the statistics since the last report; one all-reduce over the world.

        Args:
            log: Where to write; None on all ranks but one.
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
        """Draw the load of the experts since the last drawing; one all-reduce over the world.

        Args:
            log: Where to write; None on all ranks but one.
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
        """All-reduce the sums of the routers and copy them to the host."""
        table = self._unreported.new_zeros(self._unreported.shape, device=self._device)
        for tower, layer, router in self._routers:
            sums = router.statistics.take(self._device)
            table[tower, layer, : len(sums)] = sums
        dist.all_reduce(table)
        table = table.cpu()
        self._unreported += table
        self._undrawn += table


def layer_scalars(experts: ExpertsConfig, sums: torch.Tensor) -> dict[str, float]:
    """Return means over the tokens of one tower and layer, by name.

    Args:
        experts: Experts of the tower.
        sums: [7 + E or more], as in ``RoutingStatistics``, of all ranks.

    Returns:
        Scalars by name; none if there was no token.
    """
    number = experts.num_moe_experts
    tokens, *values = sums.tolist()
    if tokens == 0:
        return {}
    named = dict(zip(_NAMES[1:], (value / tokens for value in values), strict=False))
    tokens_per_expert = values[len(_NAMES) - 1 :][:number]
    scalars = {
        "untaken_percent": 100 * named["untaken"],
        "entropy_nats": named["entropy"],
        "aux_loss": named["aux_loss"],
        "z_loss": named["z_loss"],
        "causal_loss": named["causal_loss"],
        "causal_agreement_percent": 100 * named["causal_agreed"] / number,
    }
    known = {name: scalars[name] for name in _scalar_names(experts)}
    for expert, count in enumerate(tokens_per_expert):
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
    """Return the prefix of the tags of a tower's layer."""
    return f"routing/{tower}/layer_{layer:02}"


def _towers_with_experts(model: ModelConfig) -> list[tuple[int, str, ExpertsConfig]]:
    """Return index, name and experts of each tower with experts."""
    pairs = zip(model.tower_names, model.experts_of_towers, strict=True)
    return [(tower, name, experts) for tower, (name, experts) in enumerate(pairs) if experts]


def _scalar_names(experts: ExpertsConfig) -> list[str]:
    """Return the names of the scalars of a tower's routing, except the loads of its experts."""
    applies = {
        # With expert choice or a capacity, some tokens may have no expert.
        "untaken_percent": experts.sees_the_future,
        "entropy_nats": True,
        "aux_loss": experts.aux_loss_coefficient > 0,
        "z_loss": experts.z_loss_coefficient > 0,
        "causal_loss": experts.causal_router,
        "causal_agreement_percent": experts.causal_router,
    }
    return [name for name, applicable in applies.items() if applicable]


def _routing_in_words(experts: ExpertsConfig) -> str:
    if experts.routing == "topk":
        return f"top-{experts.topk or 1} routing"
    return f"expert choice, c = {experts.experts_per_token:g}"
