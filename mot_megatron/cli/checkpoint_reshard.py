"""Lay a checkpoint's files out anew, as the ranks of another layout would have written them.

A training run loads any checkpoint in any layout. After resharding, a rank finds what it loads in
whole pieces, in its own file and those of the ranks that hold the same part of the model, instead
of small parts in the files of many. Weights, optimizer state, data position and progress stay
bitwise the same.

Example: mot checkpoint reshard runs/small runs/tp4/checkpoints --world-size 4
    --set parallel.tensor_model_parallel_size=4

SRC is the folder of a run or of its checkpoints (the newest is used), or of a single checkpoint.
DST is a folder of checkpoints, created if missing; a run named tp4 resumes from the one in the
example. Without --config, the layout is that of the checkpoint, changed by --set. Of --config,
only the layout is taken (the section parallel, and training.micro_batch_size); the model must be
the same, and the rest of the stored configuration stays as it is.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mot_megatron.cli.arguments import (
    add_overrides,
    add_source_and_destination,
    positive_int,
    user_path,
)
from mot_megatron.cli.command import run_command, say

if TYPE_CHECKING:
    from mot_megatron.config import Config
    from mot_megatron.conversion.source import CheckpointSource

NAME = "checkpoint reshard"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command line."""
    add_source_and_destination(parser)
    parser.add_argument(
        "--config",
        type=user_path,
        action="append",
        metavar="FILE",
        help="configuration with the layout; may be repeated (default: that of the checkpoint)",
    )
    add_overrides(parser, "override a key of the configuration; may be repeated")
    parser.add_argument(
        "--world-size",
        type=positive_int,
        required=True,
        metavar="N",
        help="number of ranks of the layout",
    )


def run(options: argparse.Namespace) -> int:
    """Write the checkpoint and print what was written, or would be."""
    say(NAME, f"reading {options.source}")

    from mot_megatron.conversion.layout import Layout, describe_layout
    from mot_megatron.conversion.reshard import reshard
    from mot_megatron.conversion.source import CheckpointSource
    from mot_megatron.conversion.tensors import size_text
    from mot_megatron.conversion.write import check_destination

    source = CheckpointSource(options.source, options.workers)
    for line in source.skipped:
        say(NAME, f"skipped {line}")
    layout = Layout.of(_configuration(source, options), options.world_size)
    files = layout.files(source.infos)
    sizes = [sum(piece.num_bytes for piece in pieces) for pieces in files]
    check_destination(options.destination, source.checkpoint.step, sum(sizes))
    print(f"from {source.checkpoint.path}, step {source.checkpoint.step}")
    print(f"layout before: {describe_layout(source.config)}")
    print(f"layout after:  {describe_layout(layout.config)}; {layout.mesh.world_size} ranks")
    print(
        f"{len(source.infos)} tensors in {sum(map(len, files))} pieces, {size_text(sum(sizes))};"
        f" left out: none; values per file: {size_text(min(sizes))} to {size_text(max(sizes))}"
    )
    if options.dry_run:
        print("nothing was written (--dry-run)")
        return 0
    checkpoint = reshard(
        source,
        options.destination,
        layout.config,
        files,
        workers=options.workers,
        verify=options.verify,
    )
    compared = ", compared with the source" if options.verify else ""
    print(f"{checkpoint.path}: {checkpoint.num_tensors} tensors{compared}")
    return 0


def _configuration(source: CheckpointSource, options: argparse.Namespace) -> Config:
    """Return the configuration to store."""
    from mot_megatron.config_files import load_config, parse_config
    from mot_megatron.conversion.layout import layout_config

    if options.config:
        wanted = load_config(options.config, options.overrides)
    else:
        wanted = parse_config(
            source.config_text, f"{source.checkpoint.path}: its configuration", options.overrides
        )
    config, others = layout_config(source.config, wanted)
    if others:
        say(NAME, f"kept from the checkpoint, although --config differs: {', '.join(others)}")
    return config


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``mot checkpoint reshard``; return the exit status."""
    return run_command(NAME, __doc__, add_arguments, run, arguments)
