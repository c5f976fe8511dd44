"""Run a training step on several ranks of this machine and print the memory of each rank in bytes.

Example: mot memory --config configs/quickstart.toml --world-size 1
             --set training.micro_batch_size=1

The ranks run on the CPU, and sizes are read from their tensors. Weights (as forward reads them),
gradients and optimizer (fp32 weights and both moments) are maxima over the points between
micro-batches and before the step. Activations are the maximum that autograd stores for backward.
Buffers of collectives are not counted. If a step has a single micro-batch, two are run, because
gradients are read between micro-batches; a rank holds the same with one.

The same is measured for the dense twin: the same configuration, but with one tower without experts
for all modalities, and without modality parallelism. The twin runs on two numbers of ranks. On
(world size / parallel.modality_parallel_size) ranks, it has as many replicas of the model; a rank's
model state should be at most 1.1 times that of this twin. On the full world size, ZeRO shards the
state of the dense model over more replicas.
"""

from __future__ import annotations

import argparse
import datetime
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mot_megatron.cli.arguments import add_config, add_json
from mot_megatron.cli.command import QUIETLY_ON_CPU, print_json, run_command, say
from mot_megatron.errors import ConfigError, TrainingError, UserError
from mot_megatron.job.processes import end_with_parent

if TYPE_CHECKING:
    from mot_megatron.config import Config
    from mot_megatron.planning.memory import RankMemory

NAME = "memory"
ENVIRONMENT = {**QUIETLY_ON_CPU, "GLOO_SOCKET_IFNAME": "lo"}
PRELOAD = ["mot_megatron.benchmark.measure"]
SAME_REPLICAS, SAME_RANKS = "dense_same_replicas", "dense_same_ranks"
SAME = {
    SAME_REPLICAS: " (as many model replicas: ranks / modality-parallel size)",
    SAME_RANKS: " (as many ranks)",
}
"""What a dense twin and the configuration have in common, for titles."""
KINDS = ("weights", "gradients", "optimizer")
"""Fields of StateBytes that make up the model state."""


@dataclass(frozen=True)
class World:
    """A configuration, and the number of ranks on which to measure it."""

    config: Config
    num_ranks: int
    """World size."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command line."""
    add_config(parser)
    parser.add_argument(
        "--world-size", type=int, required=True, metavar="N", help="ranks (processes) to start"
    )
    parser.add_argument(
        "--timeout", type=float, default=300.0, help="seconds per measurement (default 300)"
    )
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Measure the configuration and its dense twins, and print the results."""
    if options.world_size < 1:
        raise ConfigError(f"--world-size {options.world_size}: must be at least 1")
    say(NAME, f"measuring {' + '.join(map(str, options.config))}")
    os.environ.update(ENVIRONMENT)

    from torch.multiprocessing import get_context
    from tqdm import tqdm

    from mot_megatron.config_files import load_config

    get_context("forkserver").set_forkserver_preload(PRELOAD)
    worlds = worlds_of(load_config(options.config, options.overrides), options.world_size)
    bar = tqdm(worlds.items(), "worlds", ncols=100, leave=False, disable=None)
    measured = {name: measure(world, options.timeout) for name, world in bar}
    if options.json:
        print_json(report(worlds, measured))
    else:
        print(text(worlds, measured))
    return 0


def worlds_of(config: Config, num_ranks: int) -> dict[str, World]:
    """Return the worlds to measure, by their names in the report; the configuration is first."""
    from mot_megatron.planning.arms import dense_twin

    modality = config.parallel.modality_parallel_size
    twin = dense_twin(config)
    worlds = {"measured": checked(World(config, num_ranks))}
    if modality > 1:
        worlds[SAME_REPLICAS] = checked(World(twin, num_ranks // modality))
    worlds[SAME_RANKS] = checked(World(twin, num_ranks))
    return worlds


def checked(world: World) -> World:
    """Run the checks of training; return the world with two or more micro-batches per step.

    Raises:
        ConfigError: A check failed.
    """
    from mot_megatron.rules import check_world_size

    config, parallel = world.config, world.config.parallel
    check_world_size(config, world.num_ranks)
    model_ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    if config.accumulation_steps(world.num_ranks // model_ranks) >= 2:
        return world
    doubled = {"global_batch_size": 2 * config.training.global_batch_size}
    training = config.training.model_copy(update=doubled)
    return World(config.model_copy(update={"training": training}), world.num_ranks)


def measure(world: World, timeout: float) -> list[RankMemory]:
    """Start the ranks, measure a step and stop them; return the results in rank order.

    Raises:
        UserError: A rank failed, or the ranks took too long.
    """
    from torch.multiprocessing.spawn import ProcessExitedException, start_processes

    with tempfile.TemporaryDirectory() as folder:
        ranks = start_processes(
            _rank,
            (world, Path(folder), timeout),
            nprocs=world.num_ranks,
            join=False,
            daemon=True,
            start_method="forkserver",
        )
        assert ranks is not None  # join=False returns the context
        deadline = time.monotonic() + timeout
        try:
            while not ranks.join(timeout=max(0.0, deadline - time.monotonic())):
                if time.monotonic() >= deadline:
                    raise TrainingError(f"the ranks were still running after {timeout:g} s")
        except ProcessExitedException as error:
            for path in sorted(Path(folder).glob("error.*")):
                raise ConfigError(path.read_text(encoding="utf-8")) from None
            raise TrainingError(f"a rank died: {error}") from None
        finally:
            for process in filter(None, ranks.processes):
                process.kill()
                process.join()
        results = [Path(folder) / f"result.{rank}" for rank in range(world.num_ranks)]
        return [pickle.loads(path.read_bytes()) for path in results]


def _rank(rank: int, world: World, folder: Path, timeout: float) -> None:
    """Measure a step on this rank, and write the result or the error to ``folder``."""
    import torch
    import torch.distributed as dist

    from mot_megatron.benchmark.measure import measure_step
    from mot_megatron.data.blend import open_training_data
    from mot_megatron.train.session import build_groups, build_session, resolve_config

    end_with_parent()
    torch.set_num_threads(1)
    size = world.num_ranks
    # DeepSpeed reads these even if the process group exists.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    try:
        corpus = open_training_data(world.config.data)
        config = resolve_config(world.config, corpus)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=size,
            timeout=datetime.timedelta(seconds=timeout),
        )
        groups = build_groups(config, corpus, torch.device("cpu"))
        result = measure_step(build_session(config, corpus, groups))
    except UserError as error:
        (folder / f"error.{rank}").write_text(str(error), encoding="utf-8")
        sys.exit(2)
    (folder / f"result.{rank}").write_bytes(pickle.dumps(result))
    dist.destroy_process_group()


def ratios(measured: list[RankMemory], dense: list[RankMemory]) -> dict[str, float]:
    """Return the ratios of the maxima over ranks, by kind and for the whole model state."""

    def most(ranks: list[RankMemory], kind: str) -> int:
        return max(getattr(rank.state, kind) for rank in ranks)

    return {kind: most(measured, kind) / most(dense, kind) for kind in (*KINDS, "total")}


def report(worlds: dict[str, World], measured: dict[str, list[RankMemory]]) -> dict[str, Any]:
    """Return all results for JSON: bytes, and ratios of the maxima over ranks."""
    own, *twins = measured
    return {
        "parallel": worlds[own].config.parallel.model_dump(mode="json", exclude_none=True),
        "towers": list(worlds[own].config.model.tower_names),
        "ranks": as_dict(measured[own]),
        **{
            name: {
                "num_ranks": worlds[name].num_ranks,
                "ranks": as_dict(measured[name]),
                "ratio": ratios(measured[own], measured[name]),
            }
            for name in twins
        },
    }


def as_dict(ranks: list[RankMemory]) -> list[dict[str, Any]]:
    """Return the bytes of every rank, for JSON."""
    return [
        {
            "rank": number,
            "stage": rank.stage,
            "towers": list(rank.towers),
            **{kind: getattr(rank.state, kind) for kind in KINDS},
            "total": rank.state.total,
            "activations": rank.activations,
        }
        for number, rank in enumerate(ranks)
    ]


def text(worlds: dict[str, World], measured: dict[str, list[RankMemory]]) -> str:
    """Return the tables and the ratios as text."""
    own, *twins = measured
    titles = {name: f"dense twin on {_ranks(worlds[name])}{SAME[name]}" for name in twins}
    config = worlds[own].config
    title = f"{config.run.name}, {config.model.num_towers} towers on {_ranks(worlds[own])}"
    parts = [table(f"{title}: bytes per rank", measured[own])]
    parts += [table(f"{titles[name]}: bytes per rank", measured[name]) for name in twins]
    lines = [ratio_lines(titles[name], ratios(measured[own], measured[name])) for name in twins]
    return "\n\n".join([*parts, "\n".join(lines)])


def table(title: str, ranks: list[RankMemory]) -> str:
    """Return a table with one line per rank."""
    heads = [*KINDS, "model state", "activations"]
    lines = [title, "rank stage " + "".join(f"{head:>15}" for head in heads) + "  towers"]
    for number, rank in enumerate(ranks):
        values = [getattr(rank.state, kind) for kind in KINDS]
        values += [rank.state.total, rank.activations]
        columns = "".join(f"{value:>15,}" for value in values)
        lines.append(f"{number:4} {rank.stage:5} {columns}  {', '.join(rank.towers)}"[:120])
    return "\n".join(lines)


def ratio_lines(name: str, ratio: dict[str, float]) -> str:
    """Return the ratios to a dense twin as text."""
    kinds = ", ".join(f"{kind} {ratio[kind]:.3f}" for kind in KINDS)
    return f"fullest rank / {name}:\n  {ratio['total']:.3f} of the model state ({kinds})"


def _ranks(world: World) -> str:
    return "1 rank" if world.num_ranks == 1 else f"{world.num_ranks} ranks"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``mot memory``; return the exit status."""
    return run_command(NAME, __doc__, add_arguments, run, arguments)
