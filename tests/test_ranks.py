"""run_ranks: return values arrive in rank order; errors and timeouts name their cause."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessRaisedException

from tests.ranks import run_ranks


def _sum_of_ranks(offset: int) -> tuple[int, int]:
    total = torch.tensor(dist.get_rank() + offset)
    dist.all_reduce(total)
    return dist.get_rank(), int(total)


def _fail_on_last_rank() -> None:
    if dist.get_rank() == dist.get_world_size() - 1:
        raise ValueError("rank fell over")


def _sleep_forever() -> None:
    time.sleep(3600)


def test_return_values_are_in_rank_order():
    assert run_ranks(_sum_of_ranks, 2, 10) == [(0, 21), (1, 21)]  # (0 + 10) + (1 + 10)


def test_an_error_on_one_rank_reaches_the_test():
    with pytest.raises(ProcessRaisedException, match="rank fell over"):
        run_ranks(_fail_on_last_rank, 2)


def test_a_hang_ends_at_the_time_limit_and_names_the_function():
    with pytest.raises(TimeoutError, match="_sleep_forever"):
        run_ranks(_sleep_forever, 1, timeout=1.0)
