"""The world a launcher starts: one process per device, or one process alone."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from mot_megatron.errors import ConfigError

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for the others before it gives up: a hung rank is noticed only so."""


def join_world(local_rank: int) -> torch.device:
    """Join the world that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe.

    NCCL with one GPU per rank where there are GPUs, gloo on the CPU elsewhere.

    Args:
        local_rank: this rank's place on its node.

    Returns:
        The device this rank works on.

    Raises:
        ConfigError: more ranks on the node than it has GPUs.
    """
    if not torch.cuda.is_available():
        dist.init_process_group("gloo", timeout=COLLECTIVE_TIMEOUT)
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ConfigError(
            f"local rank {local_rank} has no GPU: this node has {count}; allowed: at most {count}"
            " ranks per node"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", timeout=COLLECTIVE_TIMEOUT, device_id=device)
    return device
