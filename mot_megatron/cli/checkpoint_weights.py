"""Write the weights of a checkpoint alone, in a dtype of choice, or the mean of the last ones.

Example: mot checkpoint weights runs/small small-weights --dtype bf16

The result is a checkpoint without optimizer state, a sixth of the size in bf16. ``mot generate``,
``mot evaluate`` and ``mot upcycle`` take it; training does not resume from it. With --average N, it
has the mean of the weights of the last N checkpoints in SRC, summed in fp64.

SRC is the folder of a run or of its checkpoints (the newest is used), or of a single checkpoint.
DST is a folder of checkpoints, created if missing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from mot_megatron.cli.arguments import add_source_and_destination, positive_int
from mot_megatron.cli.command import run_command, say
from mot_megatron.cli.export import add_dtype, dtype_of

NAME = "checkpoint weights"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command line."""
    add_source_and_destination(parser)
    add_dtype(parser)
    parser.add_argument(
        "--average",
        type=positive_int,
        default=1,
        metavar="N",
        help="mean of the last N checkpoints of SRC (default: 1, the newest alone)",
    )


def run(options: argparse.Namespace) -> int:
    """Write the checkpoint and print what was written, or would be."""
    say(NAME, f"reading {options.source}")

    from mot_megatron.conversion.tensors import size_text
    from mot_megatron.conversion.weights import (
        left_out,
        newest_sources,
        weight_outputs,
        weights_metadata,
    )
    from mot_megatron.conversion.write import check_destination, write_checkpoint

    sources = newest_sources(options.source, options.average, options.workers)
    newest = sources[0]
    for line in newest.skipped:
        say(NAME, f"skipped {line}")
    outputs = weight_outputs(sources, dtype_of(options))
    total = sum(output.info.num_bytes for output in outputs)
    step = newest.checkpoint.step
    check_destination(options.destination, step, total)
    for source in sources:
        print(f"from {source.checkpoint.path}: step {source.checkpoint.step}")
    missing = ", ".join(f"{number} {kind}" for kind, number in left_out(newest).items())
    print(f"{len(outputs)} weights, {size_text(total)}; left out: {missing or 'none'}")
    if options.dry_run:
        print("nothing was written (--dry-run)")
        return 0
    checkpoint = write_checkpoint(
        options.destination,
        outputs,
        step=step,
        metadata=weights_metadata(sources),
        config_text=newest.config_text,
        workers=options.workers,
        verify=options.verify,
    )
    compared = ", compared with the source" if options.verify else ""
    print(f"{checkpoint.path}: {checkpoint.num_tensors} tensors{compared}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``mot checkpoint weights``; return the exit status."""
    return run_command(NAME, __doc__, add_arguments, run, arguments)
