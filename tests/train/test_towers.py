"""Towers that train otherwise, in every layout: frozen, or with a learning rate of their own.

Trained weights are as if the gradients of frozen towers were dropped.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from mot_megatron.data.corpus import Corpus
from mot_megatron.model.model import MixtureOfTransformers
from mot_megatron.model.sharding import SHARED, tower_of
from mot_megatron.parallel.groups import build_process_groups
from mot_megatron.train.counts import GlobalCounts
from mot_megatron.train.session import build_schedule, build_session, resolve_config
from tests.ranks import run_ranks
from tests.small_runs import small_config
from tests.train.parity import (
    BATCH,
    MP2,
    MP3,
    OFFLOAD,
    PP2,
    SHARED_PARTS,
    SP,
    STEPS,
    TIED,
    TOLERANCE,
    TP2,
    TWO_TOWERS,
    ZERO2,
    ZERO3,
    Outcome,
    assert_complete,
    assert_equal,
    reference,
    run_corpora,
    run_steps,
)

IMAGE, TEXT, SPEECH = (
    f"model.towers.{name}={{frozen=true}}" for name in ("image", "text", "speech")
)
SLOW, FAST = "model.towers.text.lr_mult=0.25", "model.towers.speech.lr_mult=2.0"
ZERO0 = "parallel.zero_stage=0"
BF16 = "training.precision=bf16"
FULL, SELECTIVE = "training.recompute=full", "training.recompute=selective"
HEADS = "parallel.attention_exchange=heads"
FOUR_LAYERS = "model.num_layers=4"
VPP2 = "parallel.virtual_pipeline_model_parallel_size=2"
EP2 = "parallel.expert_model_parallel_size=2"
FROZEN_MIXTURE = (
    "model.towers.text={frozen=true,"
    "experts={num_moe_experts=4,causal_router=true,z_loss_coefficient=0.02}}"
)
LISTED = "parallel.placement=[{text=1.0,image=0.4},{image=0.6,speech=1.0}]"


def train_plainly(
    corpus_directory: Path,
    overrides: list[str],
    dropped: set[int],
    factors: tuple[float, ...] = (1.0, 1.0, 1.0),
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[float]]:
    """Train with torch's AdamW alone, dropping the gradients of some towers.

    Args:
        corpus_directory: The corpus.
        overrides: Of the configuration, without ``model.towers``.
        dropped: Towers without gradients.
        factors: Factor on the learning rate of each tower.

    Returns:
        The first and the last weights, and the norm of the other gradients in every step.
    """
    corpus = Corpus.open(corpus_directory)
    config = resolve_config(small_config(corpus_directory, [BATCH, *overrides]), corpus)
    groups = build_process_groups(1, torch.device("cpu"))
    loader, schedule = build_session(config, corpus, groups).loader, build_schedule(config)
    model = MixtureOfTransformers(config, groups)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    kept = [p for p in model.parameters() if tower_of(p) == SHARED or tower_of(p) not in dropped]
    adamw = torch.optim.AdamW(
        [
            {
                "params": [p],
                "weight_decay": 0.1 if p.ndim > 1 else 0.0,
                "factor": 1.0 if tower_of(p) == SHARED else factors[tower_of(p)],
            }
            for p in kept
        ],
        betas=(0.9, 0.95),
        eps=config.optimizer.adam_eps,
    )
    norms = []
    for step in range(STEPS):
        batches = [loader.next_micro_batch() for _ in range(config.training.global_batch_size)]
        counts = GlobalCounts.gather(batches, config.model, groups, stop=False)
        model.zero_grad()
        for batch in batches:
            (model(batch)[0] / counts.loss_weight(config.model.loss_weights)).backward()
        norms.append(float(nn.utils.clip_grad_norm_(kept, config.optimizer.clip_grad)))
        for group in adamw.param_groups:
            group["lr"] = group["factor"] * schedule.at(step)
        adamw.step()
    return before, {name: p.detach() for name, p in model.named_parameters()}, norms


@pytest.mark.parametrize("frozen", [("image",), ("text", "speech"), ("text", "image", "speech")])
@pytest.mark.parametrize("model", [[], [*SHARED_PARTS, "model.add_qkv_bias=true", TIED]])
def test_frozen_run_equals_plain_training_without_the_towers_gradients(
    corpora: dict[str, Path], frozen: tuple[str, ...], model: list[str]
) -> None:
    corpus, towers = corpora["mixed"], ("text", "image", "speech")
    keys = [f"model.towers.{name}={{frozen=true}}" for name in frozen]
    dropped = {towers.index(name) for name in frozen}
    outcome: Outcome = run_ranks(run_steps, 1, corpus, [*model, *keys, ZERO0])[0]
    ((before, after, norms),) = run_ranks(train_plainly, 1, corpus, model, dropped)
    for name, weight in outcome.weights.items():
        belongs = any(f".towers.{tower}." in name for tower in dropped)
        assert torch.equal(weight, before[name]) == belongs, name
        torch.testing.assert_close(weight, after[name], rtol=0, atol=TOLERANCE, msg=name)
    for (total, shared, *per_tower), expected in zip(outcome.norms, norms, strict=True):
        assert total == pytest.approx(expected, rel=1e-5)
        assert shared > 0
        assert [norm == 0 for norm in per_tower] == [tower in dropped for tower in range(3)]


@pytest.mark.parametrize("model", [[], [*SHARED_PARTS, TIED]])
def test_learning_rates_of_towers_equal_plain_training(
    corpora: dict[str, Path], model: list[str]
) -> None:
    corpus = corpora["mixed"]
    outcome: Outcome = run_ranks(run_steps, 1, corpus, [*model, SLOW, FAST])[0]
    ((_, after, _),) = run_ranks(train_plainly, 1, corpus, model, set(), (0.25, 1.0, 2.0))
    for name, weight in outcome.weights.items():
        torch.testing.assert_close(weight, after[name], rtol=0, atol=TOLERANCE, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "layout", "model"),
    [
        (2, [ZERO0], [IMAGE]),
        (2, [ZERO2], [IMAGE]),
        (2, [ZERO3, FULL], [IMAGE, TEXT, SPEECH]),
        (4, [ZERO3, TP2, SP, SELECTIVE], [IMAGE]),
        (2, [OFFLOAD], [TEXT]),
        (2, [ZERO3, OFFLOAD], [TEXT]),
        (2, [TP2], [TEXT, "model.norm_placement=pre"]),
        (2, [TP2, SP, FULL], [IMAGE, TIED, "model.add_qkv_bias=true"]),
        (2, [PP2, FULL, "parallel.pipeline_layers=[3,1]"], [FOUR_LAYERS, TEXT, *TWO_TOWERS]),
        (2, [PP2, VPP2], [FOUR_LAYERS, TIED, IMAGE, TEXT, SPEECH]),
        (2, [MP2, SELECTIVE], [IMAGE, *TWO_TOWERS]),
        (2, [MP2, ZERO2], [TEXT, *TWO_TOWERS]),
        (2, [MP2, HEADS, FULL], [IMAGE, *TWO_TOWERS, TIED]),
        (2, [MP2, LISTED, OFFLOAD], [TEXT, SPEECH]),
        (2, [MP2, HEADS, ZERO2], [*SHARED_PARTS, IMAGE, SPEECH]),
        (3, [MP3, ZERO2, "training.global_batch_size=6"], [*TWO_TOWERS, IMAGE]),
        (4, [MP2, TP2, SP, ZERO2], [IMAGE, TIED]),
        (4, [MP2, PP2], [IMAGE, *TWO_TOWERS]),
        (2, [ZERO0], [SLOW, FAST]),
        (2, [ZERO2, OFFLOAD], [SLOW, FAST]),
        (2, [ZERO3], [SLOW, FAST]),
        (2, [TP2, SP], [SLOW, IMAGE, FAST]),
        (2, [PP2], [SLOW, FAST, TIED]),
        (2, [MP2, LISTED, ZERO2], [SLOW, FAST]),
        (4, [MP2, PP2, HEADS], [SLOW, *TWO_TOWERS]),
        (2, [EP2], [FROZEN_MIXTURE]),
        (4, [EP2, TP2, SP, ZERO2], [FROZEN_MIXTURE]),
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "layout", "frozen"),
    [(1, [], 1), (2, [MP2], 0), (2, [ZERO3], 1), (2, [MP2, ZERO2], 0)],
)
def test_bf16(corpora: dict[str, Path], world_size: int, layout: list[str], frozen: int) -> None:
    """Frozen weights are those that forward reads, in bf16; about three digits agree."""
    model = [*TWO_TOWERS, (TEXT, IMAGE)[frozen]]
    expected = reference(corpora["mixed"], tuple(model))
    for outcome in run_ranks(run_steps, world_size, corpora["mixed"], [*layout, BF16, *model]):
        for mine, theirs in zip(outcome.losses, expected.losses, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-2)
        for name, weight in outcome.weights.items():
            if f".towers.{frozen}." in name:
                assert torch.equal(weight, expected.weights[name].bfloat16().float()), name
