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

from mot_megatron.cli.command import choose_device, run_command, say
from mot_megatron.cli.export import add_export, dtype_of, export, open_source

NAME = "checkpoint to-megatron"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command line."""
    add_export(parser)


def run(options: argparse.Namespace) -> int:
    """Export the checkpoint, and report what was left out."""
    say(NAME, f"reading {options.source}")
    choose_device()

    from mot_megatron.conversion.megatron.export import plan_export, write_export

    source = open_source(NAME, options.source)
    plan = plan_export(source, dtype_of(options))
    print(f"from {source.checkpoint.path}, step {plan.step}")
    size = f"{plan.num_bytes / 1e9:.3f} GB"
    weights = f"{len(plan.pieces)} weights in {plan.num_tensors} tensors, {size}"
    return export(options, plan, weights, write_export)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``mot checkpoint to-megatron``; return the exit status."""
    return run_command(NAME, __doc__, add_arguments, run, arguments)
