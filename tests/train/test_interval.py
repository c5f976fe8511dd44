"""Statistics over several steps are weighted means."""

from __future__ import annotations

import math

import pytest

from mot_megatron.optim.norms import StepNorms
from mot_megatron.train.counts import GlobalCounts
from mot_megatron.train.interval import Interval
from mot_megatron.train.step import StepResult, StepSeconds


def step_of(
    bits: tuple[float, float], labels: tuple[int, int], seconds: float, norm: float
) -> StepResult:
    tokens = (labels[0] + 1, labels[1] + 1)
    return StepResult(
        modality_losses=bits,
        counts=GlobalCounts(labels, tokens, tokens, attended_pairs=10, imbalance=1.5, stop=False),
        norms=StepNorms(total=norm, per_tower=(norm, norm), shared=norm),
        learning_rate=norm / 100,
        seconds=StepSeconds(0.0, seconds, 0.0),
    )


def test_means() -> None:
    steps = [
        step_of((8.0, math.nan), (30, 0), seconds=1.0, norm=1.0),
        step_of((4.0, 6.0), (10, 5), seconds=3.0, norm=2.0),
    ]
    interval = Interval.of(steps, lambda result: 100.0 * result.counts.modality_labels[0], (1, 1))
    # (8 * 30 + 4 * 10) / 40 = 7; the second modality has labels in the second step only.
    assert interval.modality_losses == (7.0, 6.0)
    # ((30 + 1) + (10 + 1)) / 4 s and ((0 + 1) + (5 + 1)) / 4 s
    assert interval.modality_rates == (10.5, 1.75)
    assert interval.tokens_per_second == 12.25
    assert interval.seconds.total == 2.0  # (1 + 3) / 2
    assert interval.flops_per_second == 1000.0  # 100 * (30 + 10) / 4 s
    assert interval.imbalance == 1.5
    # (1 - 1 / 1.5) of steps that are forward and backward alone
    assert interval.imbalance_percent == pytest.approx(100 / 3)
    assert interval.norms.total == 2.0  # of the last step
    assert interval.learning_rate == pytest.approx(0.02)


def test_loss_of_a_modality_without_labels_is_nan() -> None:
    interval = Interval.of([step_of((8.0, math.nan), (3, 0), 1.0, 1.0)], lambda _: 1.0, (1, 1))
    assert interval.modality_losses[0] == 8.0
    assert math.isnan(interval.modality_losses[1])


def test_loss_divisor_is_the_sum_of_label_weights() -> None:
    counts = GlobalCounts((30, 10), (31, 11), (31, 11), attended_pairs=0, imbalance=1.0, stop=False)
    assert counts.loss_weight((1.0, 0.5)) == 35.0  # 30 * 1 + 10 * 0.5
    assert counts.loss_weight((0.0, 0.0)) == 1.0
