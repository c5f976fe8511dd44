"""Training with fused kernels, which Triton interprets, equals one process of plain PyTorch."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.train.parity import MP2, TWO_TOWERS, ZERO3, assert_equal, reference, run_steps

pytestmark = pytest.mark.slow

TRITON = "model.layer_backend=triton"
ONE_LAYER = "model.num_layers=1"
PRE_NORM = "model.norm_placement=pre"


@pytest.mark.parametrize(
    ("layout", "model"),
    [([ZERO3], [ONE_LAYER, PRE_NORM]), ([MP2], [ONE_LAYER, *TWO_TOWERS])],
    ids=["ZeRO-3", "modality"],
)
def test_layout_equals_one_process(
    corpora: dict[str, Path], layout: list[str], model: list[str]
) -> None:
    expected = reference(corpora["mixed"], tuple(model))
    for outcome in run_ranks(run_steps, 2, corpora["mixed"], [*layout, *model, TRITON]):
        assert_equal(outcome, expected)
