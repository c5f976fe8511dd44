"""Run work that may fail on one rank so that all ranks raise the same error.

If only one rank raised, the others would wait in their next collective until it timed out.
``on_every_rank`` and ``on_first_rank`` exchange outcomes first, and then every rank raises the same
CheckpointError. They use the default process group unless they are given another one of all ranks;
without a default group, they run in this process only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from mot_megatron.errors import CheckpointError
from mot_megatron.parallel.gather import values_of_all_ranks

T = TypeVar("T")


def rank() -> int:
    """Return this process's rank in the default group, 0 without one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of ranks in the default group, 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def on_every_rank(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """Call ``work`` on every rank and return the results of all ranks, in rank order.

    Collectives: one all-gather of objects over ``group``, by default the default group. ``work``
    may run collectives of its own only if it cannot fail on just some of the ranks.

    Raises:
        CheckpointError: ``work`` raised an OSError or a CheckpointError on at least one rank.
            Raised on every rank, with the message of the lowest such rank.
    """
    outcome = _attempt(work)
    if not dist.is_initialized():
        return _values([outcome])
    return _values(values_of_all_ranks(outcome, group))


def on_first_rank(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Call ``work`` on rank 0 only and return its result on every rank.

    Collectives: one broadcast of an object over ``group``, by default the default group.

    Raises:
        CheckpointError: ``work`` raised an OSError or a CheckpointError. Raised on every rank.
    """
    outcome = _attempt(work) if rank() == 0 else (None, None)
    if dist.is_initialized():
        box = [outcome]
        dist.broadcast_object_list(box, src=0, group=group)
        outcome = box[0]
    return _values([outcome])[0]


def describe_os_error(error: OSError) -> str:
    """Return the path, if known, and the reason in one line."""
    reason = error.strerror or str(error)
    return f"{error.filename}: {reason}" if error.filename else reason


def _attempt(work: Callable[[], T]) -> tuple[T | None, str | None]:
    try:
        return work(), None
    except OSError as error:
        return None, describe_os_error(error)
    except CheckpointError as error:
        return None, str(error)


def _values(outcomes: list[tuple[T | None, str | None]]) -> list[T]:
    for failed_rank, (_, problem) in enumerate(outcomes):
        if problem is not None:
            where = f" (rank {failed_rank})" if len(outcomes) > 1 else ""
            raise CheckpointError(problem + where)
    return [value for value, _ in outcomes]  # type: ignore[misc]  # None only if work failed
