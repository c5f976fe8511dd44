"""What counts as a spike."""

from __future__ import annotations

import math
import random

import pytest

from mot_megatron.train.spikes import LEAST_STEPS, RECENT_STEPS, SpikeGuard


def guard_after(steps: int, seed: int = 0) -> tuple[SpikeGuard, list[list[float]]]:
    """Return a guard that has seen losses around 5 and norms around 1, and what it keeps."""
    chance, recent = random.Random(seed), list[list[float]]()
    guard = SpikeGuard(recent)
    for _ in range(steps):
        loss, norm = chance.gauss(5, 0.1), chance.gauss(1, 0.2)
        assert guard.judge(loss, norm) is None
        guard.add(loss, norm)
    return guard, recent


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_no_spike_and_outliers_are(seed: int) -> None:
    guard, _ = guard_after(300, seed)
    assert guard.judge(5.4, 1.6) is None
    assert guard.judge(2.0, 0.0) is None  # lower is no problem
    loss, norm = guard.judge(5.9, 1.0), guard.judge(5.0, 3.0)
    assert loss is not None
    assert loss.startswith("the loss 5.9 is ")
    assert norm is not None
    assert norm.startswith("the gradient norm 3 is ")
    assert "standard deviations above" in norm


def test_the_bound_is_six_standard_deviations() -> None:
    recent = [[4.0, 1.0], [6.0, 1.0]] * LEAST_STEPS  # mean 5, deviation 1
    guard = SpikeGuard(recent)
    assert guard.judge(10.99, 1.0) is None
    assert guard.judge(11.01, 1.0) is not None


def test_the_first_steps_are_not_judged_and_old_ones_are_forgotten() -> None:
    guard, recent = guard_after(LEAST_STEPS - 1)
    assert guard.judge(100.0, 100.0) is None
    guard.add(5.0, 1.0)
    assert guard.judge(100.0, 1.0) is not None
    for _ in range(RECENT_STEPS):
        guard.add(50.0, 1.0)
    assert recent == [[50.0, 1.0]] * RECENT_STEPS
    assert guard.judge(50.01, 1.0) is None  # rounding
    assert guard.judge(51.0, 1.0) is not None


def test_values_that_are_not_numbers_are_not_remembered() -> None:
    guard, recent = guard_after(40)
    guard.add(math.nan, 1.0)
    guard.add(5.0, math.inf)
    assert len(recent) == 40
    assert guard.judge(math.nan, 1.0) is None  # a batch without a weighted label
