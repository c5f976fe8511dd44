"""``mot benchmark``: dispatch to the benchmarks, which are separate commands."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mot_megatron.cli.main import Command, dispatch

BENCHMARKS = {
    "layer": Command("benchmark_layer", "time one layer and other ways to untie weights"),
    "step": Command("benchmark_step", "time whole steps, also against another checkout"),
    "data": Command("benchmark_data", "time packing and the preparation of micro-batches"),
    "documents": Command("benchmark_documents", "time how fast raw files become ids"),
    "scaling": Command("benchmark_scaling", "measure, count and forecast how training scales"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``mot benchmark``; return the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    return dispatch("mot benchmark", BENCHMARKS, given)
