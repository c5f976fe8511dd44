"""Export a dense model as a distributed checkpoint of megatron-core (torch_dist).

Example: mot checkpoint to-megatron runs/dense exported --verify

The folder is what megatron-core's dist_checkpointing.save writes of a GPTModel with the local
layers, and dist_checkpointing.load reads it into one. Its arguments are in gpt_model.json. Models
with several towers, with experts or with norms after the layers are refused: no GPTModel computes
the same. The optimizer's moments are left out and counted.

The folder is written under a temporary name, with a manifest of all files, and renamed when it is
complete. No model is built: the tensors are read and written one after the other.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from mot_megatron.cli.arguments import CHECKPOINT_HELP, add_verify_and_dry_run, user_path
from mot_megatron.cli.checkpoint_to_hf import DTYPES
from mot_megatron.cli.command import choose_device, run_command, say

NAME = "checkpoint to-megatron"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command line."""
    parser.add_argument("source", type=user_path, metavar="SRC", help=CHECKPOINT_HELP)
    parser.add_argument("destination", type=user_path, metavar="DST", help="new folder to write")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="convert the weights (default: keep their dtype)"
    )
    add_verify_and_dry_run(parser)


def run(options: argparse.Namespace) -> int:
    """Export the checkpoint, and report what was left out."""
    say(NAME, f"reading {options.source}")
    choose_device()

    import torch

    from mot_megatron.conversion.folder import check_new
    from mot_megatron.conversion.megatron.export import plan_export, write_export
    from mot_megatron.conversion.source import CheckpointSource

    source = CheckpointSource(options.source)
    for line in source.skipped:
        say(NAME, f"skipped {line}")
    dtype = None if options.dtype is None else getattr(torch, DTYPES[options.dtype])
    plan = plan_export(source, dtype)
    print(f"from {source.checkpoint.path}, step {plan.step}")
    for what, count in plan.left_out.items():
        print(f"left out: {count} tensors, {what}")
    check_new(options.destination, plan.num_bytes)
    print(
        f"{len(plan.pieces)} weights in {plan.num_tensors} tensors, {plan.num_bytes / 1e9:.3f} GB"
    )
    if options.dry_run:
        print("nothing was written (--dry-run)")
        return 0
    manifest = write_export(plan, options.destination, options.verify)
    compared = ", compared with the source" if options.verify else ""
    print(f"{options.destination}: {len(manifest.files)} files{compared}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``mot checkpoint to-megatron``; return the exit status."""
    return run_command(NAME, __doc__, add_arguments, run, arguments)
