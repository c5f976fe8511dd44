"""Pipeline and modality parallelism, alone and combined, train as one process does.

Each layout trains on three corpora: all modalities in every batch, batches in which a tower of a
rank has no token, and a modality that occurs nowhere.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.train.parity import (
    BIASES,
    MP2,
    MP3,
    MP4,
    OFFLOAD,
    PP2,
    SHARED_PARTS,
    SP,
    TIED,
    TP2,
    TWO_TOWERS,
    ZERO2,
    assert_complete,
    assert_equal,
    reference,
    run_corpora,
    run_steps,
)

pytestmark = pytest.mark.slow

BUDGET = "data.packing=budget"
FOUR_LAYERS = "model.num_layers=4"
VPP2 = "parallel.virtual_pipeline_model_parallel_size=2"
HEADS = "parallel.attention_exchange=heads"
# Two micro-batches on four ranks that read different sequences.
BATCH_OF_8 = "training.global_batch_size=8"
FULL, SELECTIVE = "training.recompute=full", "training.recompute=selective"
# A tower split over two ranks that also hold other towers.
LISTED = "parallel.placement=[{text=1.0,image=0.4},{image=0.6,speech=1.0}]"


@pytest.mark.parametrize(
    ("world_size", "layout", "model"),
    [
        (2, [PP2, FULL, "parallel.pipeline_layers=[3,1]"], [FOUR_LAYERS, *TWO_TOWERS]),
        (2, [PP2, VPP2], [FOUR_LAYERS, TIED]),
        (4, [PP2, VPP2], [FOUR_LAYERS]),
        (4, [PP2, TP2, SP], [TIED]),
        (2, [MP2, "data.prefetch=true"], TWO_TOWERS),
        (2, [MP2, HEADS, FULL], [*TWO_TOWERS, TIED]),
        (2, [MP2, ZERO2, SELECTIVE], []),
        (2, [MP2, HEADS, ZERO2], [*SHARED_PARTS, BIASES]),
        (2, [MP2, LISTED, OFFLOAD], [TIED]),
        (4, [MP2, ZERO2, FULL, BATCH_OF_8], [TIED]),
        (3, [MP3, ZERO2, "training.global_batch_size=6"], [*TWO_TOWERS, TIED]),
        (4, [MP2, TP2, SP, ZERO2, SELECTIVE], [TIED]),
        (4, [MP2, PP2], [TIED]),
        (4, [MP2, PP2, VPP2, HEADS, FULL], [FOUR_LAYERS, *TWO_TOWERS]),
        (8, [MP2, PP2, TP2, SP], [TIED]),
        (8, [MP2, PP2, TP2, HEADS, FULL], TWO_TOWERS),
        (2, [PP2, OFFLOAD], [TIED, *TWO_TOWERS]),
        (2, [PP2, SELECTIVE], [BIASES, "model.norm_placement=pre"]),
        (
            3,
            ["parallel.pipeline_model_parallel_size=3", "parallel.pipeline_layers=[1,2,1]"],
            [FOUR_LAYERS, TIED],
        ),
        (4, [MP4, BATCH_OF_8], [TIED]),
        (4, [MP4, HEADS, ZERO2, BATCH_OF_8], [TIED]),
        (4, [MP2, TP2, SP, HEADS, FULL], TWO_TOWERS),
    ],
    ids=lambda value: "+".join(value).replace("parallel.", "") if isinstance(value, list) else None,
)
def test_layout_equals_one_process(
    corpora: dict[str, Path], world_size: int, layout: list[str], model: list[str]
) -> None:
    outcomes = run_ranks(run_corpora, world_size, corpora, layout + model)
    same_everywhere = [key for key in layout if key.startswith("training.global")]
    for name, corpus in corpora.items():
        expected = reference(corpus, (*model, *same_everywhere))
        of_ranks = [outcome[name] for outcome in outcomes]
        assert_complete(of_ranks, expected)
        for outcome in of_ranks:
            assert_equal(outcome, expected)
    assert any(any(outcome["lacking"].lacking) for outcome in outcomes)
    assert any(any(outcome["absent"].lacking) for outcome in outcomes)


def test_static_budgets(corpora: dict[str, Path]) -> None:
    """Batches with a fixed number of tokens per tower, on ranks that hold a tower each."""
    corpus, model = corpora["mixed"], [BUDGET, "training.micro_batch_size=2", *TWO_TOWERS]
    expected = reference(corpus, tuple(model))
    outcomes = run_ranks(run_steps, 2, corpus, [MP2, *model])
    assert_complete(outcomes, expected)
    for outcome in outcomes:
        assert_equal(outcome, expected)


@pytest.mark.parametrize(("world_size", "layout"), [(2, [MP2]), (4, [MP2, PP2])])
def test_bf16(corpora: dict[str, Path], world_size: int, layout: list[str]) -> None:
    """In bf16, partial sums of gradients are rounded, so only about three digits agree."""
    model = ["training.precision=bf16", TIED]
    expected = reference(corpora["mixed"], tuple(model))
    outcomes = run_ranks(run_steps, world_size, corpora["mixed"], layout + model)
    assert_complete(outcomes, expected)
    for outcome in outcomes:
        for mine, theirs in zip(outcome.losses, expected.losses, strict=True):
            assert mine == pytest.approx(theirs, rel=3e-3)
        for mine, theirs in zip(outcome.norms, expected.norms, strict=True):
            assert mine == pytest.approx(theirs, rel=5e-2)
