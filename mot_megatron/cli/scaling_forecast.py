"""Forecast the time of a training step on a machine that is not at hand.

Example: mot benchmark scaling forecast --config configs/paper/443m-mot-3.toml
             --world-size 16,64,256 --machine a100-80gb-efa --arms dense

The step is rehearsed on one CPU (see mot benchmark scaling rehearse), which gives COUNTED work and
traffic. A profile of the machine (DATA SHEET or MEASURED) and constants that were fitted to
published runs turn the counts into a FORECAST. The error printed with it is that of published runs
of software that the constants had not seen, as they have not seen this project's. With --anchor,
one measured run of the model scales all forecasts, and the error is that of forecasts of larger
published runs from the smallest. Nothing overlaps, as in this project's engine, and reading data
takes no time.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mot_megatron.cli.arguments import add_json, add_output, user_path
from mot_megatron.cli.command import QUIETLY_ON_CPU, print_json, run_command, say
from mot_megatron.cli.configs import config_directory
from mot_megatron.cli.scaling_rehearse import (
    add_arms,
    add_best,
    add_work,
    arms_at_sizes,
    chooser,
    rehearse_sizes,
    resolve,
    world_sizes,
)
from mot_megatron.cli.scaling_report import add_slopes
from mot_megatron.errors import ConfigError, DataError

if TYPE_CHECKING:
    from mot_megatron.config import Config
    from mot_megatron.scaling.accuracy import Expected, Fitted
    from mot_megatron.scaling.conclusions import TimeToLoss
    from mot_megatron.scaling.forecast import Forecast
    from mot_megatron.scaling.machine import Machine
    from mot_megatron.scaling.roles import Rehearsed

NAME = "benchmark scaling forecast"
COLUMNS = 6
"""Numbers of ranks side by side."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command line."""
    add_work(parser)
    parser.add_argument(
        "--machine",
        action="append",
        required=True,
        metavar="FILE|NAME",
        help="profile of the machine, or the name of one in configs/machines; may be repeated",
    )
    add_arms(parser)
    add_best(parser)
    add_slopes(parser)
    add_output(parser, "folder for report.md, forecast.json and a plot per machine", required=False)
    parser.add_argument(
        "--anchor",
        type=user_path,
        metavar="DIR",
        help="folder of a measurement of the same model on this machine (mot benchmark scaling"
        " measure), by whose smallest run the forecasts are scaled",
    )
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Rehearse, forecast and print."""
    sizes = world_sizes(options.world_size)
    say(NAME, f"rehearsing {' + '.join(map(str, options.config))} on {options.world_size} ranks")

    from mot_megatron.scaling.accuracy import expected_anchored, expected_cold, load_fitted
    from mot_megatron.scaling.machine import load_machine

    for flag in ("anchor", "best"):
        if getattr(options, flag) and len(options.machine) > 1:
            raise ConfigError(f"--{flag}: belongs to one machine, but several --machine are given")
    machines = [load_machine(machine_path(given)) for given in options.machine]
    fitted = load_fitted(config_directory() / "scaling" / "constants.toml")
    os.environ.update(QUIETLY_ON_CPU)
    config, shares = resolve(options)
    arms = arms_at_sizes(config, sizes, options, chooser(options, sizes, shares))
    rehearsed = {
        arm: rehearse_sizes(configs, shares, options.workers) for arm, configs in arms.items()
    }
    factor, anchor, expected = 1.0, "", expected_cold(fitted)
    if options.anchor:
        factor, anchor = anchor_factor(options, config, shares, machines[0], fitted)
        expected = expected_anchored(fitted)
    documents: list[dict[str, Any]] = []
    texts: list[str] = []
    for machine in machines:
        forecasts = {
            arm: [one.scaled(factor) for one in forecast_all(arms[arm], found, machine, fitted)]
            for arm, found in rehearsed.items()
        }
        documents.append(document(forecasts, machine, anchor, expected))
        texts.append(text(forecasts, machine, anchor, expected))
        if options.slopes:
            times = times_of(forecasts, options)
            documents[-1]["time_to_dense_loss"] = [asdict(each) for each in times]
            texts[-1] += "\n" + times_text(times, options)
        if options.output:
            write_plot(forecasts, machine, options.output, len(documents))
    figures = {"stamp": "FORECAST", "machines": documents}
    if options.output:
        write_report(options, figures, texts)
    if options.json:
        print_json(figures)
    else:
        print("\n\n".join(texts))
    return 0


def write_plot(
    forecasts: Mapping[str, Sequence[Forecast]], machine: Machine, directory: Path, number: int
) -> None:
    """Draw the forecasts for the machine with a number.

    Raises:
        DataError: The file cannot be written.
    """
    from mot_megatron.scaling.forecast_plot import plot_forecasts

    try:
        directory.mkdir(parents=True, exist_ok=True)
        plot_forecasts(forecasts, machine.name, directory / f"forecast-{number}.png")
    except OSError as error:
        raise DataError(f"{directory}: cannot be written: {error.strerror}") from None


def write_report(
    options: argparse.Namespace, figures: Mapping[str, Any], texts: Sequence[str]
) -> None:
    """Write report.md and forecast.json.

    Raises:
        DataError: A file cannot be written.
    """
    from mot_megatron.files import write_atomically
    from mot_megatron.scaling.markdown import wrapped

    names = " + ".join(f"`{path.name}`" for path in options.config)
    lines = [
        f"# Forecasts for {names}",
        "",
        "Written by `mot benchmark scaling forecast`. Work, traffic and memory are COUNTED, rates"
        " of machines are from their DATA SHEET or MEASURED as said, all times FORECAST.",
    ]
    for number, table in enumerate(texts, 1):
        lines += ["", f"![Plots of the table below](forecast-{number}.png)", ""]
        lines += ["```text", *table.splitlines(), "```"]
    try:
        write_atomically(options.output / "report.md", wrapped([*lines, ""]))
        document = json.dumps(figures, indent=1) + "\n"
        write_atomically(options.output / "forecast.json", document)
    except OSError as error:
        raise DataError(f"{options.output}: cannot be written: {error.strerror}") from None


def anchor_factor(
    options: argparse.Namespace,
    config: Config,
    shares: Sequence[float],
    machine: Machine,
    fitted: Fitted,
) -> tuple[float, str]:
    """Return the measured over the forecast step time of the anchor, and both in words."""
    from mot_megatron.scaling.anchor import read_anchor

    anchor = read_anchor(options.anchor, config)
    configs = {anchor.world_size: anchor.config}
    found = rehearse_sizes(configs, shares, options.workers)
    (cold,) = forecast_all(configs, found, machine, fitted)
    factor = anchor.seconds / cold.seconds
    note = (
        f"scaled by {factor:.3f}: on {anchor.world_size} rank(s), a step took {anchor.seconds:.3f}"
        f" s (MEASURED), not {cold.seconds:.3f} s"
    )
    return factor, note


def machine_path(given: str) -> Path:
    """Return the file of a profile that was given by its path or name."""
    path = user_path(given)
    if path.suffix == ".toml" or path.exists():
        return path
    return config_directory() / "machines" / f"{given}.toml"


def forecast_all(
    configs: Mapping[int, Config],
    found: Mapping[int, Sequence[Rehearsed]],
    machine: Machine,
    fitted: Fitted,
) -> list[Forecast]:
    """Return the forecast of every number of ranks."""
    from mot_megatron.scaling.forecast import forecast

    return [
        forecast(configs[size], size, roles, machine, fitted.constants)
        for size, roles in found.items()
    ]


def document(
    forecasts: Mapping[str, Sequence[Forecast]], machine: Machine, anchor: str, expected: Expected
) -> dict[str, Any]:
    """Return the forecasts for one machine as values that JSON can hold."""

    def entry(one: Forecast) -> dict[str, Any]:
        return {
            "world_size": one.world_size,
            "tokens": one.tokens,
            "step_seconds": one.seconds,
            "split_seconds": dict(one.split),
            "tokens_per_second_and_gpu": one.tokens_per_gpu_second,
            "utilization": one.utilization(machine),
            "peak_bytes": one.peak_bytes,
            "layout": dict(one.layout),
        }

    return {
        "machine": machine.name,
        "machine_stamps": machine.stamps,
        "anchor": anchor or None,
        "error_of": expected.kind,
        "error_median": expected.errors.median,
        "error_p90": expected.errors.p90,
        "forecasts": {arm: [entry(one) for one in found] for arm, found in forecasts.items()},
    }


def text(
    forecasts: Mapping[str, Sequence[Forecast]], machine: Machine, anchor: str, expected: Expected
) -> str:
    """Return the tables for one machine, each of at most COLUMNS numbers of ranks."""
    lines = [
        f"on {machine.name} ({', '.join(machine.stamps)}); all times FORECAST",
        *([anchor] if anchor else []),
        *expected.lines(),
    ]
    sizes = len(next(iter(forecasts.values())))
    for start in range(0, sizes, COLUMNS):
        part = slice(start, start + COLUMNS)
        lines += ["", *_table({arm: each[part] for arm, each in forecasts.items()}, machine)]
    lines.append("(MFU counts recomputation as work; memory is COUNTED and without fragmentation)")
    return "\n".join(lines)


def _table(of_arms: Mapping[str, Sequence[Forecast]], machine: Machine) -> list[str]:
    from mot_megatron.planning.arms import MODEL, TWIN

    forecasts, twins = of_arms[MODEL], of_arms.get(TWIN)

    def row(title: str, values: Sequence[str]) -> str:
        return f"{title:32}" + "".join(f"{value:>13}" for value in values)

    lines = [
        row("ranks", [f"{one.world_size:,}" for one in forecasts]),
        *(row(*line) for line in _layout_rows(forecasts)),
        row("tokens per step", [f"{one.tokens:,}" for one in forecasts]),
        row("seconds per step", [f"{one.seconds:.3f}" for one in forecasts]),
        row("tokens/s per GPU", [f"{one.tokens_per_gpu_second:,.0f}" for one in forecasts]),
        row("MFU", [f"{one.utilization(machine):.1%}" for one in forecasts]),
        row("GB on the fullest rank", [f"{one.peak_bytes / 1e9:.1f}" for one in forecasts]),
    ]
    if any(one.peak_bytes > machine.memory_gb * 1e9 for one in forecasts):
        lines.append(f"  more than the {machine.memory_gb:g} GB of a device: this does not fit")
    for arm, found in of_arms.items():
        if arm != MODEL:
            lines.append(row(f"{arm}, seconds per step", [f"{one.seconds:.3f}" for one in found]))
            # The arms have equal layouts apart from modality parallelism, unless each has its best.
            if any(_differs(one, other) for one, other in zip(forecasts, found, strict=True)):
                lines += [row(f"  {name}", values) for name, values in _layout_rows(found)]
        if twins and arm != TWIN:
            ratios = [one.seconds / twin.seconds for one, twin in zip(found, twins, strict=True)]
            title = "step over the dense twin's" if arm == MODEL else f"{arm} over the dense twin"
            lines.append(row(title, [f"{ratio:.3f}" for ratio in ratios]))
    lines.append("share of the step")
    causes = dict.fromkeys(cause for one in forecasts for cause in one.split)
    lines += [
        row(f"  {cause}", [f"{one.split.get(cause, 0) / one.seconds:.1%}" for one in forecasts])
        for cause in causes
    ]
    return lines


def times_of(
    forecasts: Mapping[str, Sequence[Forecast]], options: argparse.Namespace
) -> list[TimeToLoss]:
    """Return the times to the dense model's loss by the forecast step ratios."""
    from mot_megatron.planning.arms import MODEL, TWIN
    from mot_megatron.scaling.conclusions import times_to_loss
    from mot_megatron.scaling.report import Spread

    ratios = {
        one.world_size: Spread.of([one.seconds / twin.seconds])
        for one, twin in zip(forecasts[MODEL], forecasts.get(TWIN, ()), strict=False)
    }
    return times_to_loss(ratios, options.slopes, options.arm)


def times_text(times: Sequence[TimeToLoss], options: argparse.Namespace) -> str:
    """Return the times to the dense model's loss as lines."""
    lines = [
        f"time to the dense twin's loss over the twin's (step ratio FORECAST times fraction of its"
        f" steps, {times[0].stamp}, arm {options.arm}):",
    ]
    lines += [
        f"  {each.modality:10} {each.world_size:6,} ranks: {each.slope:.3f} of the steps,"
        f" {each.ratio:.3f} of the time"
        for each in times
    ]
    return "\n".join(lines)


def _differs(one: Forecast, other: Forecast) -> bool:
    ignored = ("modality-parallel size", "exchange")
    return any(one.layout[name] != other.layout[name] for name in one.layout if name not in ignored)


def _layout_rows(forecasts: Sequence[Forecast]) -> list[tuple[str, list[str]]]:
    """Return the sizes of the layouts, without those that are 1 everywhere."""
    return [
        (name, [str(one.layout[name]) for one in forecasts])
        for name in forecasts[0].layout
        if name == "ZeRO stage"
        or any(one.layout[name] not in (1, "-", "none") for one in forecasts)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``mot benchmark scaling forecast``; return the exit status."""
    return run_command(NAME, __doc__, add_arguments, run, arguments)
