"""Train a model: started on every rank by the deepspeed launcher, or alone for a single rank.

deepspeed --num_gpus N launch/train.py --config configs/quickstart.toml --set training.train_steps=9
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

# The launcher's CPU accelerator names "GPUs" 0 and 1 for its ranks; a real one would be taken.
# Before the first import that looks for CUDA, which looks only once.
if os.environ.get("DS_ACCELERATOR") == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch.distributed as dist

from mot_megatron.config import load_config
from mot_megatron.data.corpus import Corpus
from mot_megatron.errors import UserError
from mot_megatron.parallel.groups import build_process_groups
from mot_megatron.rules import check_world_size
from mot_megatron.train.distributed import join_world
from mot_megatron.train.loop import train
from mot_megatron.train.session import resolve_config

_ALONE = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}
_SECONDS_FOR_FIRST_RANK = 5
"""How long other ranks hold back an error that the first rank most likely prints as well."""


def main() -> int:
    """Run on this rank; 0 on success, 2 after an error the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--config", type=Path, required=True, help="TOML configuration file")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override a key of the configuration; may be repeated",
    )
    parser.add_argument("--local_rank", type=int, help="given by the launcher, as LOCAL_RANK is")
    arguments = parser.parse_args()
    # A launcher sets these; a process started alone is a world of one.
    for name, value in _ALONE.items():
        os.environ.setdefault(name, value)
    try:
        run(arguments.config, arguments.overrides)
    except UserError as error:
        return report(error, int(os.environ["RANK"]))
    return 0


def run(config_path: Path, overrides: list[str]) -> None:
    """Check what can be checked alone, then join the other ranks and train."""
    config = load_config(config_path, overrides)
    check_world_size(config, int(os.environ["WORLD_SIZE"]))
    corpus = Corpus.open(config.data.corpus)
    config = resolve_config(config, corpus)
    device = join_world(int(os.environ["LOCAL_RANK"]))
    try:
        groups = build_process_groups(config.parallel.tensor_model_parallel_size, device)
        train(config, corpus, groups)
    finally:
        dist.destroy_process_group()


def report(error: UserError, rank: int) -> int:
    """Print one line for the whole job where all ranks fail alike.

    The launcher ends the other ranks as soon as the first has failed; one that fails alone
    outlives the pause and says so itself.
    """
    if rank:
        time.sleep(_SECONDS_FOR_FIRST_RANK)
        print(f"error on rank {rank}: {error}", file=sys.stderr, flush=True)
    else:
        print(f"error: {error}", file=sys.stderr, flush=True)
    return 2


if __name__ == "__main__":
    sys.exit(main())
