"""Exchange of small Python values between all ranks."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def values_of_all_ranks(own: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Return the value of every rank, in rank order; the same list on every rank.

    Collective over the world: one all-gather of pickled objects, so only for a few small ones.
    It runs over ``group``, by default the default group.

    Args:
        own: This rank's value.
        group: Another group of all ranks.
    """
    values = [own] * dist.get_world_size()
    dist.all_gather_object(values, own, group=group)
    return values
