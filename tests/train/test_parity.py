"""Every data- and tensor-parallel layout trains as one process does."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.train.parity import (
    BIASES,
    DENSE,
    DP1,
    OFFLOAD,
    SHARED_PARTS,
    SP,
    STEPS,
    TIED,
    TP2,
    TWO_TOWERS,
    ZERO2,
    ZERO3,
    assert_equal,
    reference,
    run_steps,
)

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("world_size", "layout", "model"),
    [
        (2, [DP1], []),
        (2, [ZERO2, "training.micro_batch_size=2", "data.prefetch=true"], []),
        (2, [ZERO3], []),
        (2, [ZERO3, OFFLOAD], []),
        (2, ["parallel.zero_stage=0"], DENSE),
        (2, [TP2], []),
        (2, [TP2, SP], []),
        (2, [TP2, SP, ZERO3, "training.recompute=full"], SHARED_PARTS),
        (2, [TP2, "training.recompute=selective", OFFLOAD], TWO_TOWERS),
        (4, [TP2], []),
        (4, [TP2, SP, ZERO2], [TIED]),
        (4, [TP2, SP, ZERO3], [TIED, BIASES, "model.norm_placement=pre"]),
    ],
    ids=lambda value: "+".join(value).replace("parallel.", "") if isinstance(value, list) else None,
)
def test_layout_equals_one_process(
    corpora: dict[str, Path], world_size: int, layout: list[str], model: list[str]
) -> None:
    expected = reference(corpora["mixed"], tuple(model))
    assert expected.losses[-1][0] < expected.losses[0][0]  # training has an effect
    for outcome in run_ranks(run_steps, world_size, corpora["mixed"], layout + model):
        assert_equal(outcome, expected)


@pytest.mark.parametrize(
    ("world_size", "layout"), [(2, [ZERO2]), (2, [ZERO3]), (2, [TP2, SP]), (4, [TP2, SP])]
)
def test_batches_that_lack_a_modality(
    corpora: dict[str, Path], world_size: int, layout: list[str]
) -> None:
    expected = reference(corpora["lacking"], ())
    outcomes = run_ranks(run_steps, world_size, corpora["lacking"], layout)
    assert all(sum(map(bool, outcome.lacking)) > STEPS for outcome in outcomes)
    for outcome in outcomes:
        assert_equal(outcome, expected)


@pytest.mark.parametrize(("world_size", "layout"), [(2, [DP1]), (2, [TP2, SP]), (2, [ZERO3])])
def test_modality_that_occurs_nowhere(
    corpora: dict[str, Path], world_size: int, layout: list[str]
) -> None:
    expected = reference(corpora["absent"], ())
    outcomes = run_ranks(run_steps, world_size, corpora["absent"], layout)
    for outcome in outcomes:
        assert_equal(outcome, expected)
