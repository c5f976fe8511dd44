"""The world of a job: one process per device, started by a launcher, or a single process."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from mot_megatron.errors import ConfigError, TrainingError
from mot_megatron.parallel.timeouts import COLLECTIVE_TIMEOUT

START_TIMEOUT = timedelta(minutes=10)
"""How long a rank tries to connect to rank 0. Nodes start, and import packages over the network,
at different speeds."""


@dataclass(frozen=True)
class World:
    """This process's ranks, and the store that all ranks of the job share."""

    rank: int
    size: int
    local_rank: int
    """Rank of this process on its node."""
    address: str
    """Host name or address of rank 0's node."""
    store: Store
    """Key-value store hosted by rank 0, shared by all ranks."""


def find_world(rank: int, size: int, local_rank: int, address: str, port: int) -> World:
    """Connect to rank 0's store, or open it on rank 0.

    This waits for rank 0, but not for the other ranks.

    Raises:
        TrainingError: Rank 0 did not open its store in time, or the port is in use.
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
    """Return whether ranks on this machine use one GPU each, rather than the CPU."""
    return torch.cuda.is_available()


def join_world(world: World) -> torch.device:
    """Initialize ``torch.distributed``: NCCL with one GPU per rank, or gloo without GPUs.

    Returns:
        The device of this rank.

    Raises:
        ConfigError: The node has more ranks than GPUs.
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
