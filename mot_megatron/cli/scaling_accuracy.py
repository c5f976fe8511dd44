"""Test the cost model on published training runs, and fit its constants to them.

Example: mot benchmark scaling accuracy --output docs/scaling

The step times of 181 published runs (torchtitan, llm-foundry, Megatron) are forecast cold, with
constants fitted to the other families only, and anchored at the smallest run of each model. Writes
accuracy.md and constants.toml to --output. A forecast uses configs/scaling/constants.toml.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from mot_megatron.cli.arguments import add_output
from mot_megatron.cli.command import run_command, say
from mot_megatron.cli.configs import config_directory
from mot_megatron.errors import DataError

NAME = "benchmark scaling accuracy"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command line."""
    add_output(parser, "folder for accuracy.md and constants.toml")


def run(options: argparse.Namespace) -> int:
    """Fit, forecast, and write the report."""
    say(NAME, "fitting the constants without each family, then with all; about two minutes")

    from mot_megatron.files import write_atomically
    from mot_megatron.scaling.accuracy import (
        fit,
        fitted_text,
        measure_accuracy,
        report,
        summarize,
    )
    from mot_megatron.scaling.machine import load_machine
    from mot_megatron.scaling.published import paper_run, read_runs

    folder = config_directory()
    runs = read_runs(folder / "scaling" / "published_runs.csv")
    machines = {
        name: load_machine(folder / "machines" / f"{name}.toml")
        for name in sorted({paper_run("7B", 256).machine, *(run.machine for run in runs)})
    }
    accuracies = measure_accuracy(runs, machines)
    fitted = summarize(accuracies, fit(runs, machines))
    page = report(accuracies, fitted, machines)
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        write_atomically(options.output / "accuracy.md", page)
        write_atomically(options.output / "constants.toml", fitted_text(fitted))
    except OSError as error:
        raise DataError(f"{options.output}: cannot be written: {error.strerror}") from None
    print(page)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``mot benchmark scaling accuracy``; return the exit status."""
    return run_command(NAME, __doc__, add_arguments, run, arguments)
