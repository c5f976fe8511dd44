"""Time the data path: packing an epoch, and preparing one micro-batch.

Without a corpus, documents are synthetic: three modalities, median length 130 tokens, 95th
percentile 200. The goals are to pack 2 million documents per second, and to prepare the batches of
a training step in at most 2% of its duration. Packing to budgets is also timed, with the same
document lengths divided among the modalities in random proportions.

Example: mot benchmark data --corpus corpora/openmoji --step-seconds 0.6
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from mot_megatron.cli.arguments import add_json, positive_float, positive_int, user_path
from mot_megatron.cli.command import print_json, run_command, say

NAME = "benchmark data"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command line."""
    parser.add_argument(
        "--corpus",
        type=user_path,
        metavar="DIR",
        help="also pack this corpus and read batches from it",
    )
    parser.add_argument("--split", default="train", help="split of the corpus (default train)")
    parser.add_argument("--seq-length", type=positive_int, default=512, help="default 512")
    parser.add_argument("--micro-batch-size", type=positive_int, default=8, help="default 8")
    parser.add_argument(
        "--step-seconds", type=positive_float, help="duration of a training step, for comparison"
    )
    parser.add_argument(
        "--micro-batches", type=positive_int, default=1, help="per training step (default 1)"
    )
    parser.add_argument("--repeats", type=positive_int, default=15, help="samples (default 15)")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Run the benchmark and print the result."""
    say(NAME, f"packing {options.corpus or 'synthetic documents'}")

    from mot_megatron.benchmark.data_path import DataPathSettings, benchmark

    settings = DataPathSettings(
        options.corpus,
        options.split,
        options.seq_length,
        options.micro_batch_size,
        options.micro_batches,
        options.step_seconds,
        options.repeats,
    )
    result = benchmark(settings)
    if options.json:
        print_json(result)
    else:
        show(result)
    return 0


def show(result: dict[str, Any]) -> None:
    """Print the result as a few lines of text."""
    from mot_megatron.benchmark.data_path import (
        GOAL_DOCUMENTS_PER_SECOND,
        GOAL_FRACTION_OF_STEP,
        scaled,
    )

    for name, values in result["packing"].items():
        rate = scaled(values["documents_per_second"], 1e-6)
        print(
            f"packing, {name}: {rate['median']:.1f} million documents/s "
            f"({rate['low']:.1f}..{rate['high']:.1f}; goal "
            f"{GOAL_DOCUMENTS_PER_SECOND / 1e6:.0f}), {values['fill']:.2%} of the positions filled"
        )
    for name, values in result["budget_packing"].items():
        rate = scaled(values["documents_per_second"], 1e-6)
        print(
            f"packing to budgets, {name}: {rate['median']:.2f} million documents/s "
            f"({rate['low']:.2f}..{rate['high']:.2f}), {values['fill']:.2%} of the positions filled"
        )
    batches = result["batch_preparation"]
    milliseconds = scaled(batches["seconds_per_micro_batch"], 1e3)
    print(
        f"preparing {batches['tokens']} tokens of {batches['corpus']}: "
        f"{milliseconds['median']:.3f} ms ({milliseconds['low']:.3f}..{milliseconds['high']:.3f})"
    )
    if "ratio_to_step" in result:
        ratio = result["ratio_to_step"]
        print(
            f"of a step of {result['step_seconds']} s: {ratio['median']:.3%} "
            f"({ratio['low']:.3%}..{ratio['high']:.3%}; goal {GOAL_FRACTION_OF_STEP:.0%})"
        )
    print("machine: " + ", ".join(f"{key} {value}" for key, value in result["machine"].items()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``mot benchmark data``; return the exit status."""
    return run_command(NAME, __doc__, add_arguments, run, arguments)
