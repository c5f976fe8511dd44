"""Towers with experts train in every layout as one process does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.ranks import run_ranks
from tests.train.parity import (
    DENSE,
    MP2,
    MP4,
    OFFLOAD,
    PP2,
    SP,
    STEPS,
    TIED,
    TP2,
    ZERO2,
    ZERO3,
    Outcome,
    assert_complete,
    assert_equal,
    reference,
    run_steps,
)

pytestmark = pytest.mark.slow

EP2 = "parallel.expert_model_parallel_size=2"
FULL, SELECTIVE = "training.recompute=full", "training.recompute=selective"
HEADS = "parallel.attention_exchange=heads"
VPP2 = "parallel.virtual_pipeline_model_parallel_size=2"
MICRO2 = "training.micro_batch_size=2"
SPLIT_TEXT = "parallel.placement=[{text=0.6,image=1.0},{text=0.4,speech=1.0}]"
# Two ranks hold the text tower with its experts; one rank each holds the other towers.
ONE_EACH = "parallel.placement=[{text=0.6},{image=1.0},{text=0.4},{speech=1.0}]"


def experts(settings: str, tower: str = "text") -> str:
    return f"model.towers.{tower}.experts={{num_moe_experts=4,{settings}}}"


CHOICE = experts("causal_router=true,z_loss_coefficient=0.02")
WIDE_CHOICE = experts('capacity_factor=1.5,gate="softmax"', tower="image")
TOPK = experts(
    'routing="topk",topk=2,capacity_factor=0.8,aux_loss_coefficient=0.1,z_loss_coefficient=0.02'
)
# Routing that does not depend on the pool: tokens choose, none is dropped, and the balancing loss
# is computed per sequence.
POOLLESS = experts(
    'routing="topk",topk=2,gate="softmax",aux_loss_coefficient=0.5,z_loss_coefficient=0.02'
)


def ids(value: object) -> str | None:
    """Return a short test id that contains the layout only."""
    if not isinstance(value, list):
        return None
    parts = [part.removeprefix("parallel.") for part in value if ".experts=" not in part]
    return "+".join(part.replace("model_parallel_size", "") for part in parts)


def assert_all_equal(outcomes: list[Outcome], expected: Outcome) -> None:
    assert_complete(outcomes, expected)
    for outcome in outcomes:
        assert_equal(outcome, expected)


def one_rank_lacks(outcomes: list[Outcome], tower: int) -> bool:
    """Return whether, in some micro-batch, only some ranks have tokens of the tower."""
    holders = [outcome.lacking for outcome in outcomes if tower in outcome.held]
    lacking = [sum(tower in towers for towers in ranks) for ranks in zip(*holders, strict=True)]
    return any(0 < number < len(holders) for number in lacking)


@pytest.mark.parametrize(
    ("world_size", "layout", "model"),
    [
        (2, [EP2], [CHOICE, WIDE_CHOICE]),
        (2, [TP2, SP, FULL], [TOPK]),
        (4, [EP2, TP2, SP], [CHOICE, WIDE_CHOICE]),
        (4, [EP2, ZERO2, FULL], [TOPK]),  # two ranks with the same experts
        (2, [EP2, OFFLOAD, SELECTIVE], [CHOICE, WIDE_CHOICE]),
        (2, [ZERO3], [TOPK]),
        (2, [ZERO3, FULL], [CHOICE, WIDE_CHOICE]),
        (2, [PP2, VPP2, FULL], [TOPK, "model.num_layers=4"]),
        (4, [PP2, EP2], [CHOICE, TIED]),
        (2, [MP2, ZERO2], [POOLLESS]),
        (4, [MP4, ONE_EACH, EP2, HEADS], [POOLLESS]),
        (4, [MP2, TP2, SP, FULL], [POOLLESS, TIED]),
        (4, [MP2, SPLIT_TEXT, TP2, SP], [POOLLESS]),
    ],
    ids=ids,
)
def test_layout_equals_one_process(
    corpora: dict[str, Path], world_size: int, layout: list[str], model: list[str]
) -> None:
    """Towers without a token on a rank, with or without experts, do not hang or change others."""
    corpus = corpora["lacking"]
    outcomes = run_ranks(run_steps, world_size, corpus, layout + model)
    assert_all_equal(outcomes, reference(corpus, tuple(model)))
    assert any(any(outcome.lacking) for outcome in outcomes)
    # In a modality group, every rank that holds a tower gets a share of its tokens.
    assert EP2 not in layout or MP4 in layout or one_rank_lacks(outcomes, tower=0)


def test_balancing_loss_does_not_depend_on_the_micro_batch(corpora: dict[str, Path]) -> None:
    corpus = corpora["mixed"]
    for micro_batch in (2, 4):
        sizes = (POOLLESS, f"training.micro_batch_size={micro_batch}")
        assert_equal(reference(corpus, sizes), reference(corpus, (POOLLESS,)))


def test_routed_tower_without_any_token(corpora: dict[str, Path]) -> None:
    corpus, model = corpora["absent"], (WIDE_CHOICE,)  # the one whose modality is absent
    outcomes = run_ranks(run_steps, 2, corpus, [EP2, *model])
    assert_all_equal(outcomes, reference(corpus, model))
    for outcome in outcomes:
        assert len(outcome.lacking) == STEPS * 2  # 4 sequences on 2 ranks
        assert all(1 in towers for towers in outcome.lacking)


def test_experts_of_a_single_tower(corpora: dict[str, Path]) -> None:
    """A dense model with experts in every layer, the paper's MoE-4x."""
    corpus, model = corpora["mixed"], (CHOICE, *DENSE)
    outcomes = run_ranks(run_steps, 2, corpus, [EP2, *model])
    assert_all_equal(outcomes, reference(corpus, model))


def test_routing_pool_spans_the_modality_group(corpora: dict[str, Path]) -> None:
    """A tower on one of two ranks pools the sequences of both, as one rank pools two sequences."""
    corpus = corpora["mixed"]
    outcomes = run_ranks(run_steps, 2, corpus, [MP2, CHOICE])
    assert_all_equal(outcomes, reference(corpus, (CHOICE, MICRO2)))


def test_bf16(corpora: dict[str, Path]) -> None:
    """About three digits agree; a token with nearly equal scores may get another expert."""
    corpus, model = corpora["mixed"], ("training.precision=bf16", CHOICE)
    outcomes = run_ranks(run_steps, 2, corpus, [EP2, *model])
    expected = reference(corpus, model)
    assert_complete(outcomes, expected)
    for outcome in outcomes:
        for mine, theirs in zip(outcome.losses, expected.losses, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-2)
        for mine, theirs in zip(outcome.norms, expected.norms, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-1)


def test_causal_router_does_not_change_the_model(corpora: dict[str, Path]) -> None:
    corpus = corpora["mixed"]
    with_router = reference(corpus, (experts("causal_router=true"),))
    without = reference(corpus, (experts("causal_router=false"),))
    added = set(with_router.weights) - set(without.weights)
    assert added == {
        f"layers.{layer}.feed_forward.towers.0.router.causal.{name}"
        for layer in (0, 1)
        for name in ("hidden", "output")
    }
    for name, weight in without.weights.items():
        assert torch.equal(with_router.weights[name], weight), name
    assert with_router.losses == without.losses
    assert with_router.norms == without.norms
