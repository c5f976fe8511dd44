"""Write the report of a scaling measurement again, or compare two measurements.

Example: mot benchmark scaling report scaling
         mot benchmark scaling report scaling --slopes docs/compare/slopes.json --arm mot
         mot benchmark scaling report before after

One folder: writes report.md, scaling.json and scaling.png, for example of a measurement that was
interrupted. With --slopes, the report also has the time to the dense model's loss: the step ratio
times the fraction of the dense model's steps. Two folders: names the figures of the second that are
worse than those of the first beyond the spread of both; the exit status is then 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mot_megatron.cli.arguments import add_json, user_path
from mot_megatron.cli.command import print_json, run_command
from mot_megatron.cli.configs import config_directory
from mot_megatron.cli.scaling_measure import write_report
from mot_megatron.errors import ConfigError

NAME = "benchmark scaling report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command line."""
    parser.add_argument(
        "directories",
        nargs="+",
        type=user_path,
        metavar="DIR",
        help="one or two folders that mot benchmark scaling measure has written",
    )
    add_slopes(parser)
    add_json(parser)


def add_slopes(parser: argparse.ArgumentParser) -> None:
    """Add ``--slopes`` and ``--arm``."""
    parser.add_argument(
        "--slopes",
        type=slopes_path,
        metavar="FILE|paper",
        help="slopes.json of a comparison, or those that the paper has published: adds the time to"
        " the dense model's loss",
    )
    parser.add_argument(
        "--arm",
        default="mot",
        metavar="NAME",
        help="arm with the same architecture (default mot; of the paper for example mot-7b)",
    )


def slopes_path(given: str) -> Path:
    """Return the file of slopes that was given by its path, or of the paper's."""
    if given == "paper":
        return config_directory() / "scaling" / "paper_slopes.json"
    return user_path(given)


def run(options: argparse.Namespace) -> int:
    """Print the report or the comparison."""
    directories: list[Path] = options.directories
    if len(directories) > 2 or (len(directories) == 2 and options.slopes):
        raise ConfigError("expected one folder, or two without --slopes")
    if len(directories) == 1:
        return write_report(directories[0], options.json, options.slopes, options.arm)

    from mot_megatron.scaling.conclusions import regressions
    from mot_megatron.scaling.measure import read_records
    from mot_megatron.scaling.report import rows_of

    found = regressions(*(rows_of(*read_records(directory)) for directory in directories))
    if options.json:
        print_json({"regressions": found})
    else:
        print("\n".join(found) or "nothing is worse beyond the spread of both measurements")
    return int(bool(found))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``mot benchmark scaling report``; return the exit status."""
    return run_command(NAME, __doc__, add_arguments, run, arguments)
