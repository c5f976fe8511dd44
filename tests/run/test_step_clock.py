"""The time of collectives is attributed to their axes, and splits sum to the step."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from mot_megatron.job.progress_report import ProgressReport
from mot_megatron.run.step_clock import (
    CAUSES,
    COMPUTE,
    DATA,
    EXCHANGE,
    GRADIENTS,
    OPTIMIZER,
    WAITING,
    WEIGHTS,
    StepClock,
    split_step,
    without_waiting,
)
from mot_megatron.train.step import StepSeconds
from tests.ranks import run_ranks

LATE = 0.3


def time_collectives() -> dict[tuple[str, str], float]:
    """Let rank 1 come late to a sum over the world, and to one that is awaited later."""
    world, other = dist.group.WORLD, dist.new_group([0, 1])
    assert isinstance(world, dist.ProcessGroup)
    assert isinstance(other, dist.ProcessGroup)
    axes: dict[str, str] = {world.group_name: "world", other.group_name: "tensor"}
    report = ProgressReport()
    report.enter("forward and backward", 1)
    dist.barrier()
    with StepClock(axes, report, torch.device("cpu")) as clock:
        if dist.get_rank():
            time.sleep(LATE)
        dist.all_reduce(torch.ones(4))
        work = dist.all_reduce(torch.ones(4), group=other, async_op=True)
        time.sleep(LATE)  # hides the second sum
        assert work is not None
        work.wait()
        report.enter("optimizer")
        torch.ones(4).square()
    found = clock.take()
    assert not clock.take()
    return dict(found)


def test_waiting_counts_and_hidden_traffic_does_not() -> None:
    first, second = run_ranks(time_collectives, 2)
    assert set(first) == {("forward and backward", "world"), ("forward and backward", "tensor")}
    assert first["forward and backward", "world"] == pytest.approx(LATE, abs=0.1)
    assert second["forward and backward", "world"] < 0.1
    assert first["forward and backward", "tensor"] < 0.1


def test_a_split_sums_to_the_step() -> None:
    seconds = StepSeconds(data=1.0, forward_backward=10.0, optimizer=2.0)
    traffic = {
        ("data", "world"): 0.5,
        ("forward and backward", "modality"): 3.0,
        ("forward and backward", "tower text"): 1.0,
        ("forward and backward", "world"): 0.25,
        ("optimizer", "data"): 0.5,
    }
    split = split_step(seconds, traffic)
    assert list(split) == list(CAUSES)
    assert sum(split.values()) == seconds.total
    assert (split[COMPUTE], split[DATA], split[OPTIMIZER]) == (5.75, 1.0, 1.5)
    assert (split[EXCHANGE], split[GRADIENTS], split[WEIGHTS]) == (3.0, 1.25, 0.5)
    slower = {**split, COMPUTE: 4.75, GRADIENTS: 2.25}
    mean = without_waiting([split, slower], exchange=2.0)
    assert sum(mean.values()) == pytest.approx(seconds.total)
    assert (mean[COMPUTE], mean[GRADIENTS], mean[EXCHANGE]) == (5.25, 1.25, 2.0)
    assert mean[WAITING] == pytest.approx(0.5 + 1.0)
