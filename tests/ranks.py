"""Run a function on several CPU ranks, one fresh process each, over gloo.

A server process imports the slow packages once, and every rank is forked from it in about 0.2 s; a
spawned rank would import them again. (A plain fork of the test process can deadlock in OpenMP.) The
test receives the return value of every rank.
"""

from __future__ import annotations

import datetime
import gc
import os
import pickle
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import get_context
from torch.multiprocessing.spawn import start_processes

PRELOAD = [
    "torch",
    "megatron.core.parallel_state",
    "megatron.core.tensor_parallel",
    "deepspeed",
    # What most functions of the tests import, so that their ranks need not.
    "pytest",
    "tensorboard.backend.event_processing.event_accumulator",
    "mot_megatron.run.loop",
    "mot_megatron.scaling.rehearsal",
]

# The packages above read these at import, so they must be set before the server starts.
ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "TORCH_COMPILE_DISABLE": "1",  # megatron's jit fusions cost 24-40 s of compilation on CPU
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "DEEPSPEED_LOG_LEVEL": "error",
}


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 300.0
) -> list[Any]:
    """Call ``function(*args)`` on every rank of a fresh gloo world.

    Args:
        function: A module-level function (it is pickled by name).
        world_size: Number of ranks.
        args: Picklable arguments, the same on every rank.
        timeout: Seconds until the ranks are killed, including the time to start the server.

    Returns:
        The return value of every rank, which must be picklable, in rank order.

    Raises:
        torch.multiprocessing.ProcessRaisedException: A rank raised; the message has its traceback.
        TimeoutError: The ranks did not end in time; the message names the function.
    """
    os.environ.update(ENVIRONMENT)
    get_context("forkserver").set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        ranks = start_processes(
            _rank,
            (world_size, folder, timeout, function, args),
            nprocs=world_size,
            join=False,
            start_method="forkserver",
        )
        assert ranks is not None  # join=False returns the context
        deadline = time.monotonic() + timeout
        try:
            while not ranks.join(timeout=max(0.0, deadline - time.monotonic())):
                if time.monotonic() >= deadline:
                    raise TimeoutError(
                        f"{function.__module__}.{function.__name__}: ranks still running "
                        f"after {timeout} s"
                    )
        finally:
            for process in filter(None, ranks.processes):
                process.kill()
        return [pickle.loads(_result_file(folder, rank).read_bytes()) for rank in range(world_size)]


def _result_file(folder: str, rank: int) -> Path:
    return Path(folder) / f"result.{rank}"


def _rank(  # start_processes passes the rank first
    rank: int,
    world_size: int,
    folder: str,
    timeout: float,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    # Without the half million objects of the imported packages, a garbage collection takes no time
    # instead of 0.4 s; DeepSpeed collects several times when it starts.
    gc.freeze()
    torch.set_num_threads(1)
    # A launcher would set these; DeepSpeed reads them even if the world is already initialized.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=timeout),
    )
    try:
        result = function(*args)
    finally:
        dist.destroy_process_group()
    _result_file(folder, rank).write_bytes(pickle.dumps(result))
