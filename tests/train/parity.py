"""Three steps of training in any layout, compared with one process: losses, norms and weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state

from mot_megatron.data.corpus import Corpus
from mot_megatron.model.sharding import ParameterSharding, parts_of
from mot_megatron.train.session import build_groups, build_session, resolve_config
from mot_megatron.train.step import evaluate, train_step
from tests.ranks import run_ranks
from tests.small_runs import small_config

STEPS = 3
# Two ranks that read different sequences accumulate over two micro-batches each.
BATCH = "training.global_batch_size=4"
# fp32 sums in another order: about 1e-7 relative per step, amplified by Adam.
TOLERANCE = 1e-5

DP1, TP2 = "parallel.zero_stage=1", "parallel.tensor_model_parallel_size=2"
SP = "parallel.sequence_parallel=true"
ZERO2, ZERO3 = "parallel.zero_stage=2", "parallel.zero_stage=3"
OFFLOAD = "parallel.offload=optimizer"
BIASES = "model.add_qkv_bias=true"
TIED = "model.untie_embeddings_and_output_weights=false"
DENSE = ["model.modalities.image.tower=text", "model.modalities.speech.tower=text"]
TWO_TOWERS = ["model.modalities.speech.tower=text"]
SHARED_PARTS = ["model.untied.qkv=false", "model.untied.norms=false", "model.untied.qk_norm=false"]


MP2, MP3, MP4 = (f"parallel.modality_parallel_size={size}" for size in (2, 3, 4))
PP2 = "parallel.pipeline_model_parallel_size=2"


@dataclass(frozen=True)
class Outcome:
    """The results of one rank."""

    tensor_rank: int
    tensor_size: int
    held: tuple[int, ...]
    """Towers that the rank holds."""
    layers: set[str]
    """Indices of the layers that the rank holds."""
    losses: list[tuple[float, ...]]
    norms: list[tuple[float, ...]]
    held_out: tuple[float, ...]
    weights: dict[str, torch.Tensor]
    shardings: dict[str, ParameterSharding]
    lacking: list[set[int]]
    """Per micro-batch, the towers of this rank without a token."""


def run_steps(corpus_directory: Path, overrides: list[str]) -> Outcome:
    """Build a session on this rank, run some steps and evaluate."""
    config = small_config(corpus_directory, [BATCH, *overrides])
    corpus = Corpus.open(corpus_directory)
    config = resolve_config(config, corpus)
    groups = build_groups(config, corpus, torch.device("cpu"))
    session = build_session(config, corpus, groups)
    lacking: list[set[int]] = []
    original = session.loader.next_micro_batch

    def counted():
        batch = original()
        held = groups.towers_held(config.model.num_towers)
        lacking.append({tower for tower in held if batch.tower_tokens[tower] == 0})
        return batch

    session.loader.next_micro_batch = counted  # type: ignore[method-assign]
    losses, norms = [], []
    for step in range(STEPS):
        result = train_step(
            session,
            step=step + 1,
            learning_rate=session.schedule.at(step),
        )
        losses.append(result.modality_losses)
        norms.append((result.norms.total, result.norms.shared, *result.norms.per_tower))
    held_out, _ = evaluate(session, session.held_out_batches())
    parameters = dict(session.model.named_parameters())
    weights, shardings = {}, {}
    for name, state in session.engine.export_state():
        for part in parts_of(name, parameters[name]):
            weights[part.name] = state["weight"][part.rows].clone()
            shardings[part.name] = part.sharding
    return Outcome(
        groups.tensor_rank,
        groups.tensor_size,
        groups.towers_held(config.model.num_towers),
        set(session.model.layers),
        losses,
        norms,
        held_out,
        weights,
        shardings,
        lacking,
    )


def run_corpora(corpora: dict[str, Path], overrides: list[str]) -> dict[str, Outcome]:
    """Call ``run_steps`` on each corpus in turn, on the same ranks."""
    outcomes = {}
    for name, corpus in corpora.items():
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        outcomes[name] = run_steps(corpus, overrides)
    return outcomes


_references: dict[tuple[str, tuple[str, ...]], Outcome] = {}


def reference(corpus: Path, overrides: tuple[str, ...]) -> Outcome:
    """Return the outcome of one process with the same model, computed once per model."""
    key = (str(corpus), overrides)
    if key not in _references:
        _references[key] = run_ranks(run_steps, 1, corpus, list(overrides))[0]
    return _references[key]


def assert_equal(outcome: Outcome, expected: Outcome) -> None:
    """Assert that a rank's results and shards of weights equal those of one process."""
    for mine, theirs in zip(
        [*outcome.losses, *outcome.norms, outcome.held_out],
        [*expected.losses, *expected.norms, expected.held_out],
        strict=True,
    ):
        assert mine == pytest.approx(theirs, rel=TOLERANCE, abs=TOLERANCE, nan_ok=True)
    for name, mine in outcome.weights.items():
        sharding = outcome.shardings[name]
        part = expected.weights[name].view(sharding.global_shape)
        if sharding.shard_dim is not None:
            part = part.chunk(outcome.tensor_size, sharding.shard_dim)[outcome.tensor_rank]
        torch.testing.assert_close(mine.view(part.shape), part, rtol=0, atol=TOLERANCE, msg=name)


def assert_complete(outcomes: list[Outcome], expected: Outcome) -> None:
    """Assert that the ranks hold the whole model together, each its own towers and layers."""
    assert {name for outcome in outcomes for name in outcome.weights} == set(expected.weights)
    for outcome in outcomes:
        towers = {name.split(".towers.")[1][0] for name in outcome.weights if ".towers." in name}
        assert towers <= {str(tower) for tower in outcome.held}
        layers = {name.split(".")[1] for name in outcome.weights if name.startswith("layers.")}
        assert layers == outcome.layers
