"""``mot plan --best``: the layouts that fit, ranked by the forecast time of a step."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import tomli_w

from mot_megatron.cli.command import QUIETLY_ON_CPU
from mot_megatron.cli.configs import config_directory
from mot_megatron.cli.scaling_forecast import machine_path
from mot_megatron.cli.scaling_rehearse import rehearse_all
from mot_megatron.errors import ConfigError

if TYPE_CHECKING:
    from mot_megatron.config import Config, ParallelConfig
    from mot_megatron.planning.layouts import Plan, Recompute
    from mot_megatron.scaling.accuracy import Fitted
    from mot_megatron.scaling.estimate import Base, Estimate
    from mot_megatron.scaling.machine import Machine

SHOWN = 10
_WHOLE = 10**9
"""Shares of modalities are given to the planner as parts of this many tokens."""
FILL = 0.9
"""Part of a device's memory that a layout may need; collectives, temporary tensors and
fragmentation need the rest."""
LAYOUT_HEAD = f"{'tp':>3}{'pp':>4}{'vpp':>4}{'mp':>3}{'ep':>3} {'exch':5}{'zero':>5}"
EXCHANGES = {"sequence": "seq", "heads": "heads"}
CAUSES = {
    "matrix": ("matrix products", "attention"),
    "other": ("other operators",),
    "host": ("waiting for the host",),
    "tensor": ("traffic: tensor",),
    "towers": ("traffic: modality", "waiting for other towers"),
    "expert": ("traffic: expert",),
    "bubble": ("pipeline bubble",),
}
"""Columns of the table; the rest is reduction of gradients, gathering of weights and optimizer."""


def rehearse_layers(config: Config, shares: Sequence[float]) -> dict[Recompute, Base]:
    """Count the work of a layer and of the rest of a model, by recomputation.

    It is the same in all layouts, on any number of ranks and with any global batch.

    Args:
        config: Resolved configuration.
        shares: Share of the tokens of each modality.
    """
    from mot_megatron.planning.layouts import RECOMPUTE
    from mot_megatron.scaling.estimate import base_configs, base_of

    os.environ.update(QUIETLY_ON_CPU)
    worlds = {key: (each, 1) for key, each in base_configs(config).items()}
    found = {key: roles[0].ledger for key, roles in rehearse_all(worlds, shares).items()}
    return {mode: base_of(found[mode, 1], found[mode, 2]) for mode in RECOMPUTE}


def best(
    plans: Sequence[Plan],
    bases: Mapping[Recompute, Base],
    tokens: Sequence[int],
    machine: Machine,
    fitted: Fitted,
    memory: float,
) -> list[Estimate]:
    """Return the layouts that fit, the fastest first.

    Args:
        plans: Legal layouts.
        bases: Work of the model; see ``rehearse_layers``.
        tokens: Tokens of each tower, K of them; only their proportions count.
        machine: Where the step would run.
        fitted: Constants of the cost model.
        memory: Bytes that a layout may need.
    """
    from tqdm import tqdm

    from mot_megatron.scaling.estimate import estimate

    fitting: list[tuple[Plan, Recompute]] = [
        (plan, mode) for plan in plans if (mode := plan.recompute_for(memory)) is not None
    ]
    bar = tqdm(fitting, "forecasts", ncols=100, leave=False, delay=5, disable=None)
    found = [
        estimate(plan, mode, bases[mode], tokens, machine, fitted.constants) for plan, mode in bar
    ]
    return sorted(found, key=lambda each: each.seconds)


def with_best_layouts(
    config: Config,
    sizes: Sequence[int],
    shares_of_modalities: Sequence[float],
    micro_batches: int | None,
    machine: Machine,
    fitted: Fitted,
) -> Config:
    """Return the configuration with the fastest layout of each number of ranks in ``scaling``.

    Args:
        config: Resolved configuration.
        sizes: Numbers of ranks.
        shares_of_modalities: Share of the tokens of each modality.
        micro_batches: Micro-batches per rank; None for the configuration's global batch. All
            layouts get the same global batch, whatever their number of data-parallel ranks.
        machine: Where the steps would run.
        fitted: Constants of the cost model.

    Raises:
        ConfigError: No layout of a number of ranks is legal and fits.
    """
    from mot_megatron.planning.layouts import legal_layouts, plan
    from mot_megatron.planning.placing import tokens_of_towers
    from mot_megatron.scaling.estimate import overrides_of

    counts = [round(share * _WHOLE) for share in shares_of_modalities]
    tokens = tokens_of_towers(config.model, dict(zip(config.model.modalities, counts, strict=True)))
    bases = rehearse_layers(config, shares_of_modalities)
    layouts: dict[int, dict[str, Any]] = {}
    for size in sizes:
        training: dict[str, Any] = {}
        if micro_batches:
            batch = micro_batches * config.training.micro_batch_size * size
            training["global_batch_size"] = batch
        of_size = config.model_copy(
            update={"training": config.training.model_copy(update=training)}
        )
        legal = legal_layouts(of_size, size, int(machine.devices_per_node), tokens)
        plans = [plan(layout, size, tokens) for layout in legal]
        found = best(plans, bases, tokens, machine, fitted, FILL * machine.memory_gb * 1e9)
        if not found:
            raise ConfigError(f"--best: no layout of {size} ranks is legal and fits {machine.name}")
        layouts[size] = overrides_of(found[0])
        layouts[size]["training"].update(training)
    return config.model_copy(
        update={"scaling": config.scaling.model_copy(update={"layouts": layouts})}
    )


def modality_shares(config: Config, tokens: Sequence[int]) -> list[float]:
    """Divide each tower's share of the tokens equally among its modalities."""
    towers = config.model.towers_of_modalities
    return [tokens[tower] / sum(tokens) / towers.count(tower) for tower in towers]


def machine_and_constants(given: str | Sequence[str] | None) -> tuple[Machine, Fitted]:
    """Read the machine of ``--machine``, by its path or name, and the fitted constants.

    Raises:
        ConfigError: A file is absent or wrong.
    """
    from mot_megatron.scaling.accuracy import load_fitted
    from mot_megatron.scaling.machine import load_machine

    if not given:
        raise ConfigError("--best needs --machine, which gives the rates for the forecast")
    given = given if isinstance(given, str) else given[0]
    constants = config_directory() / "scaling" / "constants.toml"
    return load_machine(machine_path(given)), load_fitted(constants)


def text(
    found: Sequence[Estimate],
    notes: Sequence[str],
    machine: Machine,
    fitted: Fitted,
    memory: float,
    world_size: int,
) -> str:
    """Return the table of the fastest layouts, and the fastest as part of a configuration."""
    from mot_megatron.scaling.accuracy import expected_cold

    head = (
        f"{LAYOUT_HEAD} {'recompute':10}"
        f"{'GB':>6}{'seconds':>9}{'tok/s/GPU':>10}"
        + "".join(f"{name:>7}" for name in CAUSES)
        + f"{'weight':>7}"
    )
    lines = [
        *notes,
        f"on {machine.name} ({', '.join(machine.stamps)}); all times FORECAST",
        f"{len(found)} layouts fit in {memory / 1e9:.4g} GB; the fastest are:",
        *expected_cold(fitted).lines(),
        "shares of the step: matrix (products and attention), other (operators), host (waiting for"
        " it), tensor",
        "(parallelism), towers (exchange, and waiting for others), expert (dispatch), bubble (of"
        " pipelines), weight",
        "(the rest: reduction of gradients, gathering of weights, optimizer)",
        head,
        *(_line(each) for each in found[:SHOWN]),
    ]
    if found:
        lines += ["", "the first, for a configuration file:", "", layout_toml(found[0], world_size)]
    return "\n".join(lines).rstrip()


def _line(found: Estimate) -> str:
    parallel = found.plan.config.parallel
    tokens = found.plan.config.training.global_batch_size * found.plan.config.data.seq_length
    rate = tokens / found.seconds / found.plan.mesh.world_size
    shares = {
        name: sum(found.split.get(cause, 0.0) for cause in causes) / found.seconds
        for name, causes in CAUSES.items()
    }
    shares["weight"] = 1 - sum(shares.values())
    return (
        f"{layout_columns(parallel)} {found.recompute:10}"
        f"{found.plan.needed[found.recompute] / 1e9:6.1f}{found.seconds:9.3f}{rate:10,.0f}"
        + "".join(f"{abs(share):7.1%}" for share in shares.values())
    )


def layout_columns(parallel: ParallelConfig) -> str:
    """Return the sizes of a layout, with the columns of LAYOUT_HEAD."""
    is_exchanging = parallel.modality_parallel_size > 1
    exchange = EXCHANGES[parallel.attention_exchange] if is_exchanging else "-"
    return (
        f"{parallel.tensor_model_parallel_size:3}{parallel.pipeline_model_parallel_size:4}"
        f"{parallel.virtual_pipeline_model_parallel_size or '-':>4}"
        f"{parallel.modality_parallel_size:3}{parallel.expert_model_parallel_size:3}"
        f" {exchange:5}{parallel.zero_stage:5}"
    )


def layout_toml(found: Estimate, world_size: int) -> str:
    """Return the layout as an entry of ``[scaling.layouts]``."""
    from mot_megatron.scaling.estimate import overrides_of

    return tomli_w.dumps({"scaling": {"layouts": {str(world_size): overrides_of(found)}}})


def documents(found: Sequence[Estimate]) -> list[Mapping[str, Any]]:
    """Return the layouts for JSON."""
    from mot_megatron.scaling.estimate import overrides_of

    return [
        {
            **overrides_of(each),
            "step_seconds": each.seconds,
            "split_seconds": dict(each.split),
            "needed": each.plan.needed[each.recompute],
        }
        for each in found
    ]
