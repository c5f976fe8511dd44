"""Train a model. Start it with the deepspeed launcher, or directly for a single rank.

deepspeed --num_gpus N --module mot_megatron.cli.train --config configs/quickstart.toml
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from mot_megatron.cli.arguments import add_config, add_local_rank, user_path
from mot_megatron.cli.command import hide_gpus_from_cpu_ranks
from mot_megatron.errors import UserError
from mot_megatron.job.launch import Launch, read_launch
from mot_megatron.job.orphans import leave_without_launcher
from mot_megatron.job.outputs import protect_outputs
from mot_megatron.job.progress_report import ProgressReport
from mot_megatron.job.start_notes import StartNotes
from mot_megatron.job.stop import StopRequest
from mot_megatron.job.verdict import USER_ERROR_STATUS, report_user_error

if TYPE_CHECKING:
    import torch

    from mot_megatron.config import Config
    from mot_megatron.data.corpus import Corpus
    from mot_megatron.job.distributed import World

_START_SECONDS = 30.0
"""How long rank 0 may take to import its libraries, and then to open its store or to fail."""


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config(parser)
    add_local_rank(parser)
    parser.add_argument(
        "--benchmark",
        type=user_path,
        metavar="FILE",
        help="only time the steps: write their seconds to FILE (JSON), and nothing else; no run"
        " folder, checkpoints, evaluation, samples or logs",
    )
    parser.add_argument(
        "--synthetic",
        metavar="NAME=SHARE[,...]",
        help="with --benchmark: instead of the corpus, one batch with these shares of the tokens of"
        " each modality, as in text=0.5,image=0.5",
    )
    options = parser.parse_args(arguments)
    if options.synthetic is not None and options.benchmark is None:
        parser.error("--synthetic needs --benchmark")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run on this rank; return 0 on success and 2 after an error that the user can fix."""
    options = parse_arguments(arguments)
    protect_outputs()
    hide_gpus_from_cpu_ranks()
    try:
        launch = read_launch(os.environ)
    except UserError as error:
        return report_user_error(error)

    from mot_megatron.config_files import load_config
    from mot_megatron.rules import check_world_size

    if launch.size > 1:
        clear = launch.local_rank == 0 and launch.host_key_may_recur
        StartNotes(launch.host_key).write(launch.rank, clear)
    with StopRequest(launch.launchers) as stop:
        try:
            # Before the slow imports: most mistakes are found here, in less than a second.
            config = load_config(options.config, options.overrides)
            check_world_size(config, launch.size)
        except UserError as error:
            return _report_config_error(error, launch, stop)

        def work(world: World, progress_report: ProgressReport) -> None:
            if options.synthetic is not None:
                run_on_synthetic(config, world, progress_report, stop, options)
            else:
                run(config, world, progress_report, stop, options.benchmark)

        return _run_watched(work, launch, stop)


def _report_config_error(error: UserError, launch: Launch, stop: StopRequest) -> int:
    """Report an error of the configuration, once if all ranks have it.

    Another rank is silent unless rank 0 opens its store, which means that rank 0 has no error and
    waits for this rank. The watchdog then ends all ranks.
    """
    if launch.rank > 0:
        deadline = time.monotonic() + _START_SECONDS
        while not _accepts_connections(launch):
            if stop.requested or time.monotonic() > deadline:
                return USER_ERROR_STATUS
            time.sleep(0.2)

        def fail(*_: object) -> NoReturn:
            raise error

        return _run_watched(fail, launch, stop)
    return report_user_error(error)


def _accepts_connections(launch: Launch) -> bool:
    try:
        socket.create_connection((launch.address, launch.port), timeout=1).close()
    except OSError:
        return False
    return True


def _report_connection_error(error: UserError, launch: Launch, stop: StopRequest) -> int:
    """Report an error of the connection, once if rank 0 has it too and the launcher ends others."""
    if launch.rank > 0:
        deadline = time.monotonic() + (_START_SECONDS if launch.launchers else 0)
        while time.monotonic() < deadline:
            if stop.requested:
                return USER_ERROR_STATUS
            time.sleep(0.1)
        error = UserError(f"rank {launch.rank} (host {socket.gethostname()}): {error}")
    return report_user_error(error)


def _run_watched(
    work: Callable[[World, ProgressReport], None], launch: Launch, stop: StopRequest
) -> int:
    progress_report = ProgressReport()
    leave_without_launcher(launch.launchers, progress_report, reports=launch.local_rank == 0)
    # Libraries look for these; a launcher sets them, and a single process is a world of one.
    os.environ.update(
        RANK=str(launch.rank),
        WORLD_SIZE=str(launch.size),
        LOCAL_RANK=str(launch.local_rank),
        MASTER_ADDR=launch.address,
        MASTER_PORT=str(launch.port),
    )

    from mot_megatron.job.distributed import find_world
    from mot_megatron.job.watch import Watchdog

    try:
        world = find_world(launch)
        with Watchdog(world, progress_report):
            work(world, progress_report)
    except UserError as error:
        return _report_connection_error(error, launch, stop)
    return 0


def run(
    config: Config,
    world: World,
    progress_report: ProgressReport,
    stop: StopRequest,
    benchmark: Path | None = None,
) -> None:
    """Check what one rank can check alone, then join the other ranks and train.

    Args:
        config: Configuration.
        world: The ranks of this job.
        progress_report: Receives the current phase of this rank.
        stop: Source of stop requests.
        benchmark: Only time the steps, and write their times to this file.
    """
    if world.rank > 0 and not sys.warnoptions:
        warnings.simplefilter("ignore")  # libraries give every rank the same warnings
    # Import these under the watchdog: they take seconds, and if one fails on a node (for example
    # because a package is missing), the other ranks must end too.
    import torch.distributed as dist

    from mot_megatron.data.blend import open_training_data
    from mot_megatron.job.distributed import works_on_gpus
    from mot_megatron.model.operations import check_backend
    from mot_megatron.planning.placement_table import placement_table
    from mot_megatron.rules import check_device
    from mot_megatron.run.loop import train
    from mot_megatron.run.timing import time_steps
    from mot_megatron.train.preflight import check_codecs, check_documents
    from mot_megatron.train.session import (
        build_groups,
        build_session,
        resolve_config,
        tower_flops,
    )

    check_device(config, works_on_gpus())
    check_backend(config.model.layer_backend, works_on_gpus())
    corpus = open_training_data(config.data)
    config = resolve_config(config, corpus)
    check_documents(config, corpus)
    check_codecs(corpus)
    groups = build_groups(config, corpus, join(world, config, corpus))
    if groups.placement is not None and groups.rank == 0:
        flops = tower_flops(config, corpus)
        print(placement_table(config, groups.mesh, groups.placement, flops), flush=True)
    if benchmark is not None:
        session = build_session(config, corpus, groups, progress_report)
        time_steps(session, benchmark, stop)
    else:
        train(config, corpus, groups, progress_report, stop)
    # Only after success: after an error, other ranks would fail over the closed connections
    # before they could report the cause.
    dist.destroy_process_group()


def join(world: World, config: Config, corpus: Corpus | None) -> torch.device:
    """Join the other ranks, check that all agree, and return the device of this one."""
    from mot_megatron.job.distributed import join_world
    from mot_megatron.job.hardware import disable_malloc_trim
    from mot_megatron.train.agreement import check_ranks_agree

    device = join_world(world)
    check_ranks_agree(config, corpus)
    if device.type == "cpu":
        disable_malloc_trim()
    return device


def run_on_synthetic(
    config: Config,
    world: World,
    progress_report: ProgressReport,
    stop: StopRequest,
    options: argparse.Namespace,
) -> None:
    """Join the other ranks and time steps on synthetic batches; as ``run``."""
    import torch.distributed as dist

    from mot_megatron.job.distributed import works_on_gpus
    from mot_megatron.model.operations import check_backend
    from mot_megatron.rules import check_device
    from mot_megatron.run.timing import time_steps
    from mot_megatron.scaling.synthetic import SyntheticBatches, build_groups, parse_shares
    from mot_megatron.train.session import build_trainer

    check_device(config, works_on_gpus())
    check_backend(config.model.layer_backend, works_on_gpus())
    config.model.num_vocabulary_rows  # noqa: B018 - raises if the vocabulary is unknown
    given = [share for share in options.synthetic.split(",") if share]
    shares = parse_shares(list(config.model.modalities), given)
    groups = build_groups(config, shares, join(world, config, None))
    batches = SyntheticBatches(config, groups, shares)
    time_steps(build_trainer(config, groups, batches, progress_report), options.benchmark, stop)
    dist.destroy_process_group()


def end_process(status: int) -> NoReturn:
    """End this process at once; everything is written and closed by now.

    Python would first destroy what the libraries have built, which takes seconds, and the next job
    waits for it.
    """
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    end_process(main())
