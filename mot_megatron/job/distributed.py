"""The world of a job: one process per device, started by a launcher, or a single process."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from mot_megatron.errors import ConfigError, TrainingError
from mot_megatron.job.launch import Launch
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
    port: int
    """Port of rank 0's store."""
    key: bytes
    """Secret that the ranks of one launch share; see ``Launch.key``."""
    host_key: bytes
    """The same of the ranks on this host; see ``Launch.host_key``."""
    store: Store
    """Key-value store hosted by rank 0, shared by all ranks. Anyone who reaches the port can read
    it."""

    def publish(self, name: str, value: str) -> None:
        """Put a value into the store, for all ranks.

        Raises:
            TrainingError: The connection to rank 0 was lost.
        """
        try:
            self.store.set(name, value)
        except RuntimeError as error:
            raise self._lost(error) from error

    def look_up(self, name: str) -> str:
        """Wait for a value in the store and return it.

        Raises:
            TrainingError: The connection to rank 0 was lost, or the value did not come in time.
        """
        try:
            return self.store.get(name).decode()
        except RuntimeError as error:
            raise self._lost(error) from error

    def _lost(self, error: RuntimeError) -> TrainingError:
        return TrainingError(
            f"lost rank 0 at {self.address}, port {self.port}, during start: {_first_line(error)}"
        )


def find_world(launch: Launch) -> World:
    """Connect to rank 0's store, or open it on rank 0.

    This waits for rank 0, but not for the other ranks.

    Raises:
        TrainingError: Rank 0 did not open its store in time, its address is unknown, or the port is
            in use.
    """
    place = f"{launch.address}, port {launch.port}"
    try:
        # Otherwise a store tries to resolve an unknown name for minutes.
        socket.getaddrinfo(launch.address, launch.port)
        store = TCPStore(
            launch.address,
            launch.port,
            world_size=launch.size,
            is_master=launch.rank == 0,
            timeout=START_TIMEOUT,
            wait_for_workers=False,
        )
    except socket.gaierror as error:
        raise TrainingError(
            f"rank 0's host {launch.address!r} is unknown here: {error.strerror}; set"
            " MASTER_ADDR, or --master_addr of the launcher"
        ) from error
    except dist.DistError as error:
        if launch.rank == 0:
            raise TrainingError(
                f"rank 0 cannot listen at {place}: {_first_line(error)}; if another job uses this"
                " port, choose one with --master_port"
            ) from error
        raise TrainingError(f"no connection to rank 0 at {place}: {_first_line(error)}") from error
    return World(
        launch.rank,
        launch.size,
        launch.local_rank,
        launch.address,
        launch.port,
        launch.key,
        launch.host_key,
        store,
    )


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


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
    # Without device_id: with it, every new group splits the world's communicator, which all ranks
    # must take part in, and a large world has thousands of groups. Without it, a group gets its
    # communicator at its first collective, from its members alone.
    dist.init_process_group("nccl", timeout=COLLECTIVE_TIMEOUT, **place)
    return device
