"""Let one process act as any rank of a large world, using torch's fake backend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def fake_world(rank: int, world_size: int) -> Iterator[None]:
    """Act as ``rank`` of a world whose collectives do nothing, and destroy the world at the end."""
    leave_world()
    dist.init_process_group(
        "cpu:fake,meta:fake", store=FakeStore(), rank=rank, world_size=world_size
    )
    try:
        yield
    finally:
        leave_world()


def leave_world() -> None:
    """Destroy the process groups of megatron and torch, if any exist."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
