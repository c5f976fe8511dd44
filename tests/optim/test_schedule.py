"""Tests of the learning-rate schedule."""

from __future__ import annotations

import math

import pytest

from mot_megatron.optim.schedule import LearningRateSchedule, ScheduleStyle


@pytest.mark.parametrize(
    ("style", "step", "expected"),
    [
        ("cosine", 0, 0.25),  # 1.0 * 1 / 4
        ("cosine", 3, 1.0),  # 1.0 * 4 / 4
        ("cosine", 4, 1.0),  # the decay starts
        ("cosine", 8, 0.55),  # halfway: 0.1 + 0.9 / 2
        ("cosine", 6, 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))),
        ("cosine", 12, 0.1),
        ("cosine", 1000, 0.1),
        ("linear", 1, 0.5),
        ("linear", 6, 0.775),  # 0.1 + 0.9 * (1 - 2 / 8)
        ("linear", 12, 0.1),
        ("linear", 13, 0.1),
        ("constant", 2, 0.75),
        ("constant", 4, 1.0),
        ("constant", 1000, 1.0),
    ],
)
def test_learning_rate(style: ScheduleStyle, step: int, expected: float):
    schedule = LearningRateSchedule(
        peak=1.0, minimum=0.1, warmup_steps=4, decay_steps=8, style=style
    )
    assert schedule.at(step) == pytest.approx(expected, rel=1e-12)


def test_without_warmup_the_first_step_uses_the_peak():
    assert LearningRateSchedule(2.0, 0.0, 0, 10, "linear").at(0) == 2.0


def test_without_decay_steps_the_minimum_follows_the_warmup():
    schedule = LearningRateSchedule(2.0, 0.5, 2, 0, "cosine")
    assert [schedule.at(step) for step in range(4)] == [1.0, 2.0, 0.5, 0.5]
