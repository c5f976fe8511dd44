"""``mot benchmark``: the benchmarks, each a command of its own."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mot_megatron.cli.main import Command, dispatch

BENCHMARKS = {
    "layer": Command("benchmark_layer", "time one layer against other ways to untie weights"),
    "data": Command("benchmark_data", "time packing and the preparation of micro-batches"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``mot benchmark``; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    return dispatch("mot benchmark", BENCHMARKS, given)
