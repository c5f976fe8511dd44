"""Models of tokens and vectors train in every layout as one process does."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.train.parity import (
    DP1,
    PP2,
    SP,
    TIED,
    TP2,
    TWO_TOWERS,
    ZERO2,
    ZERO3,
    assert_complete,
    assert_equal,
    reference,
    run_steps,
)
from tests.vector_corpus import DIFFUSION, FLOW, write_vector_corpus

pytestmark = pytest.mark.slow

DROPOUT = "model.modalities.image.objective.condition_dropout=0.5"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vector_corpus(tmp_path_factory.mktemp("vectors") / "corpus")


@pytest.mark.parametrize(
    ("world_size", "layout", "model"),
    [
        (2, [DP1], [FLOW, DROPOUT]),
        (2, [ZERO3], [FLOW, DROPOUT]),
        (2, [TP2], [DIFFUSION]),
        (2, [TP2, SP, ZERO3], [FLOW, DROPOUT]),
        (4, [TP2, SP, ZERO2], [DIFFUSION, TIED, *TWO_TOWERS]),
        (2, [PP2], [FLOW, DROPOUT, TIED]),
        (2, [PP2, "training.recompute=full"], [DIFFUSION]),
    ],
    ids=lambda value: "+".join(value).replace("parallel.", "") if isinstance(value, list) else None,
)
def test_layout_equals_one_process(
    corpus: Path, world_size: int, layout: list[str], model: list[str]
) -> None:
    expected = reference(corpus, tuple(model))
    outcomes = run_ranks(run_steps, world_size, corpus, layout + model)
    assert_complete(outcomes, expected)
    for outcome in outcomes:
        assert_equal(outcome, expected)
    assert expected.weights["latent_exits.image.vector"].any()  # they start as zeros
