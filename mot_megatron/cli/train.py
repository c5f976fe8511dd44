"""Train a model. Start it with the deepspeed launcher, or directly for a single rank.

deepspeed --num_gpus N --module mot_megatron.cli.train --config configs/quickstart.toml
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mot_megatron.cli.arguments import add_config
from mot_megatron.errors import UserError

if TYPE_CHECKING:
    from mot_megatron.job.distributed import World
    from mot_megatron.job.progress_report import ProgressReport

_ALONE = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}
"""Environment of a world of one rank, for a process that was started without a launcher."""


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config(parser)
    parser.add_argument(
        "--local_rank", type=int, help="set by the launcher, which also sets LOCAL_RANK; unused"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run on this rank; return 0 on success and 2 after an error that the user can fix."""
    options = parse_arguments(arguments)
    # With DeepSpeed's CPU accelerator, the launcher lists the ranks' devices in
    # CUDA_VISIBLE_DEVICES, which would give them real GPUs. Clear it before the first import that
    # checks for CUDA, since the check is done only once.
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for name, value in _ALONE.items():
        os.environ.setdefault(name, value)

    from mot_megatron.job.distributed import find_world
    from mot_megatron.job.progress_report import ProgressReport
    from mot_megatron.job.watch import Watchdog, report_user_error

    progress_report = ProgressReport()
    try:
        world = find_world(
            int(os.environ["RANK"]),
            int(os.environ["WORLD_SIZE"]),
            int(os.environ["LOCAL_RANK"]),
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
        )
        with Watchdog(world, progress_report):
            run(options.config, options.overrides, world, progress_report)
    except UserError as error:
        return report_user_error(error)
    return 0


def run(
    config_paths: list[Path], overrides: list[str], world: World, progress_report: ProgressReport
) -> None:
    """Run the checks that need no other rank, then join the other ranks and train."""
    # Import while the watchdog runs: it takes seconds, and if it fails on one node (a missing
    # package), the watchdog informs the other ranks.
    import torch.distributed as dist

    from mot_megatron.config_files import load_config
    from mot_megatron.data.corpus import Corpus
    from mot_megatron.job.distributed import join_world, works_on_gpus
    from mot_megatron.job.hardware import disable_malloc_trim
    from mot_megatron.planning.placement_table import placement_table
    from mot_megatron.rules import check_device, check_world_size
    from mot_megatron.run.loop import train
    from mot_megatron.train.preflight import check_documents
    from mot_megatron.train.session import build_groups, resolve_config, tower_flops

    config = load_config(config_paths, overrides)
    check_world_size(config, world.size)
    check_device(config, works_on_gpus())
    corpus = Corpus.open(config.data.corpus)
    config = resolve_config(config, corpus)
    check_documents(config, corpus)
    device = join_world(world)
    if device.type == "cpu":
        disable_malloc_trim()
    groups = build_groups(config, corpus, device)
    if groups.placement is not None and groups.rank == 0:
        flops = tower_flops(config, corpus)
        print(placement_table(config, groups.mesh, groups.placement, flops), flush=True)
    train(config, corpus, groups, progress_report)
    # Only after success: after an error, closed connections would make other ranks fail before
    # they could report the cause.
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
