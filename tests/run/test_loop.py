"""The training loop on one or several ranks: stop requests, resuming, errors, evaluations."""

from __future__ import annotations

import json
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mot_megatron.data.corpus import Corpus
from mot_megatron.errors import UserError
from mot_megatron.parallel.groups import build_process_groups
from mot_megatron.run import loop
from mot_megatron.train.session import resolve_config
from mot_megatron.train.step import StepResult
from tests.ranks import run_ranks
from tests.small_runs import small_config, write_corpus

pytestmark = pytest.mark.slow

TP2 = "parallel.tensor_model_parallel_size=2"


def train_on_ranks(
    corpus_directory: Path,
    runs: Path,
    overrides: list[str],
    signalled_rank: int | None,
    signalled_step: int = 3,
) -> str | None:
    """Train, sending SIGTERM to one rank after one of its steps; return the error, if any."""
    config = small_config(corpus_directory, [f"run.directory={runs}", *overrides])
    corpus = Corpus.open(corpus_directory)
    groups = build_process_groups(config.parallel.tensor_model_parallel_size, torch.device("cpu"))
    original = loop.train_step

    def step_and_signal(*arguments: object, step: int, **keywords: object) -> StepResult:
        result = original(*arguments, step=step, **keywords)  # type: ignore[arg-type]
        if step == signalled_step and groups.rank == signalled_rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    loop.train_step = step_and_signal  # type: ignore[assignment]
    try:
        loop.train(resolve_config(config, corpus), corpus, groups)
    except UserError as error:
        return str(error)
    return None


def train_on_a_disk_that_fills(corpus_directory: Path, runs: Path) -> tuple[str | None, int]:
    """Train; rank 1 cannot write large files from step 5 on. Return error and steps."""
    config = small_config(corpus_directory, [f"run.directory={runs}"])
    config = config.model_copy(
        update={"checkpoint": config.checkpoint.model_copy(update={"interval_steps": 2})}
    )
    corpus = Corpus.open(corpus_directory)
    groups = build_process_groups(1, torch.device("cpu"))
    original, steps = loop.train_step, 0

    def step_on_a_full_disk(*arguments: object, step: int, **keywords: object) -> StepResult:
        nonlocal steps
        if step == 5 and groups.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        steps = step
        return original(*arguments, step=step, **keywords)  # type: ignore[arg-type]

    loop.train_step = step_on_a_full_disk  # type: ignore[assignment]
    try:
        loop.train(resolve_config(config, corpus), corpus, groups)
    except UserError as error:
        return str(error), steps
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return None, steps


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("loop") / "corpus")


@pytest.mark.parametrize("layout", [[TP2], [TP2, "parallel.sequence_parallel=true"], []])
def test_signal_to_one_rank_stops_all(corpus: Path, tmp_path: Path, layout: list[str]) -> None:
    errors = run_ranks(train_on_ranks, 2, corpus, tmp_path, layout, 1)
    assert errors == [None, None]
    # Signalled in step 3, agreed on in step 4.
    saved = sorted(path.name for path in (tmp_path / "small" / "checkpoints").iterdir())
    assert saved == ["step_00000004"]
    assert not (tmp_path / "small" / "summary.json").exists()


def test_failed_save_in_the_background_ends_all_ranks(corpus: Path, tmp_path: Path) -> None:
    first, second = run_ranks(train_on_a_disk_that_fills, 2, corpus, tmp_path)
    assert first == second
    error, steps = first
    assert error is not None
    saved = tmp_path / "small" / "checkpoints"
    # The save of step 4 may be complete by then. A failure is noticed before or by the next save.
    failed = 4 if "step_00000004" in error else 6
    assert f"cannot save checkpoint {saved}/step_{failed:08d}: File too large (rank 1)" in error
    assert failed < steps <= failed + 2
    assert max(path.name for path in saved.iterdir()) == f"step_{failed - 2:08d}"


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_saves_are_logged(corpus: Path, tmp_path: Path, asynchronous: str) -> None:
    overrides = ["training.train_steps=4", "checkpoint.interval_steps=2", "checkpoint.keep=1"]
    overrides += [f"checkpoint.asynchronous={asynchronous}", "checkpoint.keep_every_steps=2"]
    assert run_ranks(train_on_ranks, 1, corpus, tmp_path, overrides, None) == [None]
    events = EventAccumulator(str(tmp_path / "small" / "tensorboard"), {"scalars": 0}).Reload()
    stalls, writes = (
        {point.step: point.value for point in events.Scalars(f"checkpoint/{name}_seconds")}
        for name in ("stall", "write")
    )
    assert stalls.keys() == writes.keys() == {2, 4}
    assert min(*stalls.values(), *writes.values()) > 0
    if asynchronous == "false":
        assert all(stalls[step] > writes[step] for step in writes)
    kept = sorted(path.name for path in (tmp_path / "small" / "checkpoints").iterdir())
    assert kept == ["step_00000002", "step_00000004"]


def test_skipped_evaluation_is_run_after_resuming(corpus: Path, tmp_path: Path) -> None:
    overrides = ["training.train_steps=8", "evaluation.interval_steps=2"]
    assert run_ranks(train_on_ranks, 1, corpus, tmp_path, overrides, 0) == [None]
    assert evaluated_steps(tmp_path / "small") == [2]  # it saves and leaves at once after step 4
    assert run_ranks(train_on_ranks, 1, corpus, tmp_path, overrides, None) == [None]
    assert evaluated_steps(tmp_path / "small")[:3] == [2, 4, 6]


def test_stop_request_ends_an_evaluation(corpus: Path, tmp_path: Path) -> None:
    overrides = ["training.train_steps=4", "evaluation.interval_steps=3"]
    assert run_ranks(train_on_ranks, 1, corpus, tmp_path, overrides, 0) == [None]
    # The request came in step 3.
    assert (tmp_path / "small" / "checkpoints" / "step_00000003").is_dir()
    assert evaluated_steps(tmp_path / "small") == []
    assert run_ranks(train_on_ranks, 1, corpus, tmp_path, overrides, None) == [None]
    assert evaluated_steps(tmp_path / "small") == [3, 4]


def test_more_steps_keep_the_warmup_and_mark_the_summary_stale(
    corpus: Path, tmp_path: Path
) -> None:
    unset = ["-optimizer.lr_warmup_steps"]
    summary = tmp_path / "small" / "summary.json"
    more = ["training.train_steps=1000"]
    few = [*unset, "training.train_steps=4"]
    assert run_ranks(train_on_ranks, 1, corpus, tmp_path, few, None) == [None]
    assert "stale" not in json.loads(summary.read_text())
    # Stops after a few steps of a thousand, of which a fiftieth would be warm-up.
    assert run_ranks(train_on_ranks, 1, corpus, tmp_path, [*unset, *more], 0, 6) == [None]
    assert json.loads(summary.read_text())["stale"] is True
    events = EventAccumulator(str(tmp_path / "small" / "tensorboard"), {"scalars": 0}).Reload()
    rates = {point.step: point.value for point in events.Scalars("learning_rate")}
    assert rates[5] == pytest.approx(1e-2, rel=0.01)


def test_resuming_another_model_names_the_changed_keys(corpus: Path, tmp_path: Path) -> None:
    few = ["training.train_steps=1"]
    assert run_ranks(train_on_ranks, 1, corpus, tmp_path, few, None) == [None]
    deeper = [*few, "model.num_layers=3"]
    (error,) = run_ranks(train_on_ranks, 1, corpus, tmp_path, deeper, None)
    assert error is not None
    assert error.endswith("(model.num_layers was 2 and is 3)")


def test_new_run_that_is_refused_leaves_no_folder(corpus: Path, tmp_path: Path) -> None:
    enormous = ["model.init_std=1e30"]
    errors = run_ranks(train_on_ranks, 2, corpus, tmp_path, enormous, None)
    assert all(error is not None and "step 1: the loss of" in error for error in errors)
    assert not (tmp_path / "small").exists()
    few = ["training.train_steps=1"]
    assert run_ranks(train_on_ranks, 1, corpus, tmp_path, few, None) == [None]
    deeper = [*few, "model.num_layers=3"]
    (error,) = run_ranks(train_on_ranks, 1, corpus, tmp_path, deeper, None)
    assert error is not None
    assert (tmp_path / "small" / "summary.json").exists()


def evaluated_steps(run: Path) -> list[int]:
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    if "loss_held_out/text" not in events.Tags()["scalars"]:
        return []
    return [point.step for point in events.Scalars("loss_held_out/text")]


def test_all_ranks_report_that_the_run_folder_cannot_be_created(
    corpus: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    runs.write_text("a file")
    errors = run_ranks(train_on_ranks, 2, corpus, runs, [], None)
    assert errors[0] == errors[1]
    assert errors[0] is not None
    assert str(runs) in errors[0]


def test_unwritable_summary_does_not_fail_the_run(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "small" / "summary.json.tmp").mkdir(parents=True)
    errors = run_ranks(train_on_ranks, 2, corpus, tmp_path, ["training.train_steps=1"], None)
    assert errors == [None, None]  # the run itself is done


def test_last_evaluation_covers_the_whole_split_or_what_was_asked(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    reached = []
    final = "evaluation.final_max_sequences=1"
    for limit in ([], ["evaluation.max_sequences=1"], ["evaluation.max_sequences=1", final]):
        overrides = ["training.train_steps=1", f"run.name=limit{len(limit)}", *limit]
        assert run_ranks(train_on_ranks, 1, corpus, tmp_path, overrides, None) == [None]
        summary = tmp_path / f"limit{len(limit)}" / "summary.json"
        reached.append(json.loads(summary.read_text())["modalities"])
    assert reached[0] == reached[1] != reached[2]


def test_modality_without_held_out_tokens(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", without="speech")
    overrides = ["training.train_steps=1"]
    assert run_ranks(train_on_ranks, 1, corpus, tmp_path, overrides, None) == [None]
    summary = json.loads((tmp_path / "small" / "summary.json").read_text())["modalities"]
    assert set(summary["speech"].values()) == {None}
    assert None not in summary["text"].values()
