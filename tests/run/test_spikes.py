"""Steps with a problem are skipped or undone exactly, in every kind of layout."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from mot_megatron.config import Config
from mot_megatron.data.corpus import Corpus
from mot_megatron.errors import UserError
from mot_megatron.run import loop
from mot_megatron.run.spikes import MOST_SKIPPED, SPIKES_FILE
from mot_megatron.train.session import Session, build_groups, build_session, resolve_config
from mot_megatron.train.step import StepResult, train_step
from tests.ranks import run_ranks
from tests.small_runs import small_config, write_corpus

pytestmark = pytest.mark.slow

STEPS, SAVED, BAD = 9, 4, 7
BF16 = "training.precision=bf16"
# How the bad step comes about, what is done about it, and the layout. That a step which is not
# applied changes nothing is tested for all ZeRO stages with the engine.
LAYOUTS: dict[str, tuple[str, str, list[str]]] = {
    "zero0": ("nan", "skip", ["parallel.zero_stage=0"]),
    "zero3-bf16": ("nan", "rollback", ["parallel.zero_stage=3", BF16]),
    "pp-bf16": ("judged", "rollback", ["parallel.pipeline_model_parallel_size=2", BF16]),
    "mp": ("judged", "skip", ["parallel.modality_parallel_size=2"]),
}
State = dict[str, dict[str, torch.Tensor]]


class _Injection:
    """Makes one step bad, once, and keeps the session and what was read."""

    def __init__(self, kind: str, bad: set[int]) -> None:
        self.kind = kind
        self.bad = bad
        self.read: dict[int, list[list[int]]] = {}
        self.sessions: list[Session] = []
        self._build, self._step = build_session, train_step

    def build(self, config: Config, *arguments: Any) -> Session:
        session = self._build(config, *arguments)
        self.sessions.append(session)
        return session

    def step(self, session: Session, *, step: int, judge: Any, **options: Any) -> StepResult:
        is_bad = step in self.bad
        self.bad -= {step} if self.kind != "always" else set()
        reader, forward = session.loader._reader, session.engine.forward
        original = reader.read

        def read(sequences: list[Any], places: Any) -> Any:
            found = [[int(document) for document in each] for each in sequences]
            self.read.setdefault(step, []).extend(found)
            return original(sequences, places)

        def broken(*inputs: Any) -> Any:
            loss, sums = forward(*inputs)
            return loss * math.nan, sums * math.nan

        reader.read = read  # type: ignore[method-assign]
        if is_bad and self.kind == "nan" and dist.get_rank() == 1:
            session.engine.forward = broken  # type: ignore[method-assign]
        if is_bad and self.kind != "nan":
            judge = lambda *_: "injected"  # noqa: E731
        try:
            return self._step(session, step=step, judge=judge, **options)
        finally:
            reader.read = original  # type: ignore[method-assign]
            session.engine.forward = forward  # type: ignore[method-assign]


def config_of(corpus: Path, runs: Path, overrides: list[str]) -> Config:
    common = [f"run.directory={runs}", f"training.train_steps={STEPS}"]
    common += [f"checkpoint.interval_steps={SAVED}", "evaluation.interval_steps=100"]
    common += ["training.micro_batch_size=2", "logging.interval_steps=1"]
    config = small_config(corpus, [*common, *overrides])
    return resolve_config(config, Corpus.open(corpus))


def groups_of(config: Config, corpus: Path) -> Any:
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    return build_groups(config, Corpus.open(corpus), torch.device("cpu"))


def train_with(injection: _Injection, config: Config, corpus: Path) -> str | None:
    """Train with the loop; return the error, if any."""
    groups = groups_of(config, corpus)
    loop.build_session, loop.train_step = injection.build, injection.step  # type: ignore[assignment]
    try:
        loop.train(config, Corpus.open(corpus), groups)
    except UserError as error:
        return str(error)
    finally:
        loop.build_session, loop.train_step = build_session, train_step
    return None


def state_of(session: Session) -> State:
    return {name: dict(state) for name, state in session.engine.export_state()}


def expected(config: Config, corpus: Path, act: str) -> State:
    """Train without the loop: leave the bad step's update out, or undo the steps since the save."""
    session = build_session(config, Corpus.open(corpus), groups_of(config, corpus))
    saved, step = {}, 0
    undone = act == "skip"
    while step < STEPS:
        if step == SAVED and not saved:
            saved = state_of(session)
        if step + 1 == BAD and act == "skip":
            for _ in range(config.accumulation_steps(session.groups.data_size)):
                session.loader.next_micro_batch()
        else:
            train_step(session, step=step + 1, learning_rate=session.schedule.at(step))
        step += 1
        if step == BAD and not undone:
            session.engine.import_state(saved, SAVED)
            step, undone = SAVED, True
    return state_of(session)


def compare(corpus: Path, runs: Path, layouts: dict[str, tuple[str, str, list[str]]]) -> list[str]:
    """Return what differs, on this rank."""
    wrong = []
    for name, (kind, act, overrides) in layouts.items():
        settings = [*overrides, f"training.on_spike={act}", f"run.name={name}-{act}"]
        config = config_of(corpus, runs, settings)
        injection = _Injection(kind, {BAD})
        if error := train_with(injection, config, corpus):
            wrong.append(f"{name} {act}: {error}")
        got, want = state_of(injection.sessions[0]), expected(config, corpus, act)
        wrong += [
            f"{name} {act}: {parameter} {key}"
            for parameter, state in want.items()
            for key, tensor in state.items()
            if not torch.equal(got[parameter][key], tensor)
        ]
        everyones: list[Any] = [None] * dist.get_world_size()
        # A rollback reads the batch of the same step number again.
        dist.all_gather_object(everyones, injection.read[BAD][: config_rows(config, injection)])
        lines = (config.run_directory / SPIKES_FILE).read_text().splitlines()
        record = json.loads(lines[0])
        if len(lines) != 1 or (record["step"], record["act"]) != (BAD, act):
            wrong.append(f"{name} {act}: recorded {lines}")
        read = {tuple(sequence) for each in everyones for sequence in each}
        if read != {tuple(sequence) for sequence in record["documents"]}:
            wrong.append(f"{name} {act}: documents {record['documents']}")
    return wrong


def config_rows(config: Config, injection: _Injection) -> int:
    """Return how many sequences this rank reads in a step."""
    session = injection.sessions[0]
    rows = session.loader._rows
    return rows * config.accumulation_steps(session.groups.data_size)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("spikes") / "corpus")


def test_bad_steps_are_skipped_or_undone_bit_for_bit(corpus: Path, tmp_path: Path) -> None:
    wrong = run_ranks(compare, 2, corpus, tmp_path, LAYOUTS, timeout=400)
    assert wrong == [[], []]


def stop_in_the_end(corpus: Path, runs: Path) -> list[str | None]:
    """Return the errors of runs that do not get past their bad steps."""
    errors = []
    for name, bad, settings in (
        ("stop", {BAD}, ["training.on_spike=stop"]),
        ("skip", {*range(BAD, 99)}, ["training.on_spike=skip", "training.train_steps=30"]),
        ("back", {BAD}, ["training.on_spike=rollback", "training.max_rollbacks=2"]),
        ("early", {2}, ["training.on_spike=rollback"]),
    ):
        config = config_of(corpus, runs, [*settings, f"run.name={name}"])
        errors.append(train_with(_Injection("always", bad), config, corpus))
    return errors


def test_a_run_stops_if_spikes_do_not_end(corpus: Path, tmp_path: Path) -> None:
    (errors,) = run_ranks(stop_in_the_end, 1, corpus, tmp_path)
    stop, skip, back, early = (str(error) for error in errors)
    file = f"its documents are in {tmp_path / 'stop' / SPIKES_FILE}"
    saved = f"last good checkpoint: step {SAVED}"
    assert stop == f"step {BAD}: injected; no weight was changed; {file}; {saved}"
    assert f"step {BAD + MOST_SKIPPED}: injected" in skip
    assert f"{MOST_SKIPPED} steps in a row were skipped already" in skip
    assert "training.max_rollbacks = 2 are used up" in back
    assert "there is no checkpoint to go back to yet" in early
    acts = [json.loads(line)["act"] for line in (tmp_path / "back" / SPIKES_FILE).open()]
    assert acts == ["rollback", "rollback", "stop"]
