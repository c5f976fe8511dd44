"""Write the report of a scaling measurement again, for example of an interrupted one.

Example: mot benchmark scaling report scaling
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from mot_megatron.cli.arguments import add_json, user_path
from mot_megatron.cli.command import run_command
from mot_megatron.cli.scaling_measure import write_report

NAME = "benchmark scaling report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command line."""
    parser.add_argument(
        "directory",
        type=user_path,
        metavar="DIR",
        help="folder that mot benchmark scaling measure has written",
    )
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Write and print the report; return 1 if a job failed."""
    return write_report(options.directory, options.json)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``mot benchmark scaling report``; return the exit status."""
    return run_command(NAME, __doc__, add_arguments, run, arguments)
