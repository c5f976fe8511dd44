"""A resumed run equals an uninterrupted one: bitwise in the same layout, closely in others."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mot_megatron.config import Config
from mot_megatron.data.corpus import Corpus
from mot_megatron.model.sharding import ParameterSharding, sharding_of
from mot_megatron.run import loop
from mot_megatron.train.session import Session, build_groups, resolve_config
from mot_megatron.train.step import StepResult
from tests.ranks import run_ranks
from tests.small_runs import small_config, write_corpus

pytestmark = pytest.mark.slow

STEPS = 12
SAVED = 4
# fp32 sums in another order: about 1e-7 relative per step, amplified by Adam over twelve steps.
TOLERANCE = 1e-5

ZERO1, ZERO3 = "parallel.zero_stage=1", "parallel.zero_stage=3"
BF16_ZERO2 = ["parallel.zero_stage=2", "training.precision=bf16"]
TP = "parallel.tensor_model_parallel_size=2"
SP = "parallel.sequence_parallel=true"
PP, MP = "parallel.pipeline_model_parallel_size=2", "parallel.modality_parallel_size=2"
LISTED = "parallel.placement=[{text=1.0,image=0.4},{image=0.6,speech=1.0}]"
TIED = "model.untie_embeddings_and_output_weights=false"
# Log every step, because intervals restart when a run is resumed.
EVERY_STEP = "logging.interval_steps=1"
TWO_MICRO_BATCHES = "training.micro_batch_size=2"
INTERVALS = [f"checkpoint.interval_steps={SAVED}", "evaluation.interval_steps=6"]


class _PowerCutError(Exception):
    """Simulates the sudden end of a process."""


@dataclass(frozen=True)
class Outcome:
    """The results of one job on one rank."""

    tensor_rank: int
    tensor_size: int
    losses: list[tuple[float, ...]]
    norms: list[tuple[float, ...]]
    state: dict[str, dict[str, torch.Tensor]]
    """This tensor-parallel rank's whole weights and optimizer states, by parameter."""
    shardings: dict[str, ParameterSharding]
    optimizer_steps: int


def run_training(corpus: Path, overrides: list[str], cut_after: int | None) -> Outcome:
    """Run ``train`` on this rank, and abort it after ``cut_after`` steps of this job."""
    config = resolve_config(small_config(corpus, overrides), Corpus.open(corpus))
    groups = build_groups(config, Corpus.open(corpus), torch.device("cpu"))
    sessions: list[Session] = []
    results: list[StepResult] = []
    build_session, train_step = loop.build_session, loop.train_step

    def kept_session(config: Config, *arguments: object) -> Session:
        sessions.append(build_session(config, *arguments))  # type: ignore[arg-type]
        return sessions[-1]

    def recorded_step(*arguments: object, **options: object) -> StepResult:
        if len(results) == cut_after:
            raise _PowerCutError
        results.append(train_step(*arguments, **options))  # type: ignore[arg-type]
        return results[-1]

    loop.build_session, loop.train_step = kept_session, recorded_step
    try:
        loop.train(config, Corpus.open(corpus), groups)
    except _PowerCutError:
        assert cut_after is not None
    engine = sessions[0].engine
    return Outcome(
        groups.tensor_rank,
        groups.tensor_size,
        [result.modality_losses for result in results],
        [(r.norms.total, r.norms.shared, *r.norms.per_tower) for r in results],
        {name: dict(state) for name, state in engine.export_state()},
        {name: sharding_of(parameter) for name, parameter in sessions[0].model.named_parameters()},
        engine.optimizer_steps,
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "small")


def train(
    corpus: Path, runs: Path, overrides: list[str], cut_after: int | None = None, ranks: int = 2
) -> list[Outcome]:
    length = f"training.train_steps={STEPS}"
    settings = [f"run.directory={runs}", length, EVERY_STEP, TWO_MICRO_BATCHES, *INTERVALS]
    return run_ranks(run_training, ranks, corpus, [*settings, *overrides], cut_after)


def ranks_of(layout: list[str]) -> int:
    return 4 if MP in layout and PP in layout else 2


OneProcess = Callable[[bool], Outcome]
"""Whether the embedding is tied -> the run of one process."""


@pytest.fixture(scope="module")
def one_process(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> OneProcess:
    @functools.cache
    def run(tied: bool) -> Outcome:
        return train(corpus, tmp_path_factory.mktemp("whole"), [TIED] if tied else [], ranks=1)[0]

    return run


def points_of(runs: Path) -> dict[str, list[tuple[int, float]]]:
    """Scalars that TensorBoard shows of the only run in ``runs``: tag -> (step, value)."""
    events = EventAccumulator(str(runs / "small" / "tensorboard"), {"scalars": 0}).Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in tags}


@pytest.mark.parametrize(
    "layout", [[ZERO1], [ZERO3], BF16_ZERO2], ids=["zero1", "zero3", "bf16-zero2"]
)
def test_resume_is_bitwise(corpus: Path, tmp_path: Path, layout: list[str]) -> None:
    whole = train(corpus, tmp_path / "whole", layout)
    # Three steps after the checkpoint are lost and repeated; they have been logged already.
    first = train(corpus, tmp_path / "cut", layout, cut_after=SAVED + 3)
    resumed = train(corpus, tmp_path / "cut", layout)
    for rank, expected in enumerate(whole):
        assert len(expected.losses) == STEPS
        assert first[rank].losses == expected.losses[: SAVED + 3]
        assert resumed[rank].losses == expected.losses[SAVED:]
        assert resumed[rank].norms == expected.norms[SAVED:]
        assert resumed[rank].optimizer_steps == STEPS
        assert resumed[rank].state.keys() == expected.state.keys()
        for name, state in expected.state.items():
            assert len(state) == 3
            for kind, tensor in state.items():
                assert torch.equal(resumed[rank].state[name][kind], tensor), (name, kind)
        # Otherwise the equality above would prove nothing.
        assert any(
            not torch.equal(first[rank].state[n]["weight"], s["weight"])
            for n, s in expected.state.items()
        )
    shown, expected_points = points_of(tmp_path / "cut"), points_of(tmp_path / "whole")
    assert shown.keys() == expected_points.keys()
    for tag, points in expected_points.items():
        steps = list(range(1, STEPS + 1))
        if "held_out" in tag:
            steps = [6, STEPS]
        elif tag.startswith("checkpoint"):
            steps = [SAVED, 2 * SAVED, STEPS]
        assert [step for step, _ in points] == [step for step, _ in shown[tag]] == steps, tag
        if tag.startswith(("loss", "gradient", "learning")):
            assert shown[tag] == points, tag


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([TP, SP], [ZERO3]),
        ([ZERO3], [TP]),
        ([MP, PP, TIED], [TP, TIED]),
        ([TP, TIED], [MP, PP, TIED]),
        ([MP, LISTED], [PP]),
    ],
    ids=["tp2-to-dp2", "dp2-to-tp2", "mp2pp2-to-tp2", "tp2-to-mp2pp2", "mp2-to-pp2"],
)
def test_resume_under_another_layout(
    corpus: Path, tmp_path: Path, one_process: OneProcess, before: list[str], after: list[str]
) -> None:
    expected = one_process(TIED in before)
    train(corpus, tmp_path / "cut", before, cut_after=SAVED, ranks=ranks_of(before))
    resumed_ranks = train(corpus, tmp_path / "cut", after, ranks=ranks_of(after))
    assert {name for outcome in resumed_ranks for name in outcome.state} == set(expected.state)
    for resumed in resumed_ranks:
        for mine, theirs in zip(
            [*resumed.losses, *resumed.norms],
            [*expected.losses[SAVED:], *expected.norms[SAVED:]],
            strict=True,
        ):
            assert mine == pytest.approx(theirs, rel=TOLERANCE, abs=TOLERANCE)
        for name, state in resumed.state.items():
            sharding = resumed.shardings[name]
            part = expected.state[name]["weight"].view(sharding.global_shape)
            if sharding.shard_dim is not None:
                part = part.chunk(resumed.tensor_size, sharding.shard_dim)[resumed.tensor_rank]
            mine = state["weight"].view(part.shape)
            torch.testing.assert_close(mine, part, rtol=0, atol=TOLERANCE, msg=name)
