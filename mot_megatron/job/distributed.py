"""The world a launcher starts: one process per device, or one process alone."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from mot_megatron.errors import ConfigError, TrainingError
from mot_megatron.parallel.timeouts import COLLECTIVE_TIMEOUT

START_TIMEOUT = timedelta(minutes=10)
"""For all ranks to come: nodes start, and import over the network, at different speeds."""


@dataclass(frozen=True)
class World:
    """This process's place among those of a job."""

    rank: int
    size: int
    local_rank: int
    """Its place on its node."""
    address: str
    """Of the node of rank 0."""
    store: Store
    """Held by rank 0: what is set on one rank can be read on all."""


def find_world(rank: int, size: int, local_rank: int, address: str, port: int) -> World:
    """Reach rank 0's store, or open it on rank 0; waits for rank 0 but for nobody else.

    Raises:
        TrainingError: rank 0 did not open its store in time, or the port is taken.
    """
    try:
        store = TCPStore(
            address,
            port,
            world_size=size,
            is_master=rank == 0,
            timeout=START_TIMEOUT,
            wait_for_workers=False,
        )
    except dist.DistError as error:
        reason = str(error).partition("\n")[0]
        raise TrainingError(
            f"rank {rank} of {size}: no connection to rank 0 at {address}, port {port}: {reason}"
        ) from error
    return World(rank, size, local_rank, address, store)


def works_on_gpus() -> bool:
    """Whether ranks on this machine get a GPU each; else they work on the CPU."""
    return torch.cuda.is_available()


def join_world(world: World) -> torch.device:
    """Join the other ranks: NCCL with one GPU per rank where there are GPUs, else gloo.

    Returns:
        The device this rank works on.

    Raises:
        ConfigError: more ranks on the node than it has GPUs.
    """
    place = {"store": world.store, "rank": world.rank, "world_size": world.size}
    if not works_on_gpus():
        dist.init_process_group("gloo", timeout=COLLECTIVE_TIMEOUT, **place)
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if world.local_rank >= count:
        raise ConfigError(
            f"local rank {world.local_rank} has no GPU: this node has {count}; allowed: at most"
            f" {count} ranks per node"
        )
    device = torch.device("cuda", world.local_rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", timeout=COLLECTIVE_TIMEOUT, device_id=device, **place)
    return device
