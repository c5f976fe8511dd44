"""Train a model. Start it with the deepspeed launcher, or directly for a single rank.

deepspeed --num_gpus N launch/train.py --config configs/quickstart.toml --set training.train_steps=9
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

# With the CPU accelerator, the launcher sets CUDA_VISIBLE_DEVICES to its local ranks, so real GPUs
# with these numbers would be used. Hide them before the first import that looks for CUDA, which
# looks only once.
if os.environ.get("DS_ACCELERATOR") == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

from mot_megatron.errors import UserError
from mot_megatron.job.distributed import World, find_world, join_world, works_on_gpus
from mot_megatron.job.progress_report import ProgressReport
from mot_megatron.job.watch import Watch, report_mendable

_ALONE = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}


def main() -> int:
    """Train on this rank; return the exit status, 0 or 2 (an error that the user can fix)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--config",
        type=Path,
        action="append",
        required=True,
        help="TOML configuration file; may be repeated, later files override earlier ones",
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override a configuration key; may be repeated",
    )
    parser.add_argument(
        "--local_rank", type=int, help="set by the launcher; ignored in favor of LOCAL_RANK"
    )
    arguments = parser.parse_args()
    # A launcher sets these; without one, the process is a world of one rank.
    for name, value in _ALONE.items():
        os.environ.setdefault(name, value)
    progress_report = ProgressReport()
    try:
        world = find_world(
            int(os.environ["RANK"]),
            int(os.environ["WORLD_SIZE"]),
            int(os.environ["LOCAL_RANK"]),
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
        )
        with Watch(world, progress_report):
            run(arguments.config, arguments.overrides, world, progress_report)
    except UserError as error:
        return report_mendable(error)
    return 0


def run(
    config_paths: list[Path], overrides: list[str], world: World, progress_report: ProgressReport
) -> None:
    """Check what one rank can check alone, then join the other ranks and train."""
    # Import these under the watchdog: they take seconds, and if one fails on a node (for example
    # because a package is missing), the other ranks must end too.
    import torch.distributed as dist

    from mot_megatron.config_files import load_config
    from mot_megatron.data.corpus import Corpus
    from mot_megatron.job.hardware import keep_freed_memory
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
        keep_freed_memory()
    groups = build_groups(config, corpus, device)
    if groups.placement is not None and groups.rank == 0:
        flops = tower_flops(config, corpus)
        print(placement_table(config, groups.mesh, groups.placement, flops), flush=True)
    train(config, corpus, groups, progress_report)
    # Not after an error: other ranks would fail because this one closes its connections.
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
