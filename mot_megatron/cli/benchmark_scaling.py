"""``mot benchmark scaling``: dispatch to its commands."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mot_megatron.cli.main import Command, dispatch

COMMANDS = {
    "measure": Command("scaling_measure", "time training on growing numbers of ranks"),
    "report": Command("scaling_report", "write the report of a measurement again"),
    "rehearse": Command("scaling_rehearse", "count the work and traffic of a step"),
    "calibrate": Command("scaling_calibrate", "measure a profile of this machine"),
    "forecast": Command("scaling_forecast", "forecast the time of a step on a machine"),
    "accuracy": Command("scaling_accuracy", "test the forecasts on published runs"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``mot benchmark scaling``; return the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    return dispatch("mot benchmark scaling", COMMANDS, given)
