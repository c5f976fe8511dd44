"""Frozen weights are stored once and without moments; towers are frozen when a run resumes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mot_megatron.checkpoint.find import CheckpointInfo
from mot_megatron.checkpoint.load import read_whole_tensors
from mot_megatron.checkpoint.storage import read_index, stored_tensors
from mot_megatron.conversion.layout import Layout
from mot_megatron.conversion.source import CheckpointSource
from mot_megatron.data.corpus import Corpus
from mot_megatron.errors import UserError
from mot_megatron.run import loop
from mot_megatron.train.session import build_groups, build_session, resolve_config
from mot_megatron.train.state import Progress, restore, save
from mot_megatron.train.step import train_step
from tests.ranks import run_ranks
from tests.small_runs import small_config, write_corpus

pytestmark = pytest.mark.slow

FROZEN = "model.towers.image.frozen=true"
TP2 = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
PP2 = ["parallel.pipeline_model_parallel_size=2"]
MP2 = ["parallel.modality_parallel_size=2"]
ZERO3 = ["parallel.zero_stage=3"]
OFFLOAD = ["parallel.offload=optimizer", "parallel.zero_stage=2"]


def work(
    corpus_directory: Path, overrides: list[str], source: CheckpointInfo | None, steps: int
) -> tuple[CheckpointInfo, list[tuple[float, ...]]]:
    """Restore ``source``, train some steps, and save; return the checkpoint and the losses."""
    corpus = Corpus.open(corpus_directory)
    config = resolve_config(small_config(corpus_directory, overrides), corpus)
    session = build_session(config, corpus, build_groups(config, corpus, torch.device("cpu")))
    done = 0 if source is None else restore(session, source).steps
    rates = [session.schedule.at(done + step) for step in range(steps)]
    results = [
        train_step(session, step=done + number, learning_rate=rate)
        for number, rate in enumerate(rates, 1)
    ]
    saved = save(session, Progress(steps=done + steps))
    return saved, [result.modality_losses for result in results]


def tensors_of(checkpoint: CheckpointInfo) -> dict[str, torch.Tensor]:
    return read_whole_tensors(checkpoint, stored_tensors(read_index(checkpoint.path)).keys())


def is_of_image(name: str) -> bool:
    return ".towers.1." in name


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "small")


def test_every_layout_resumes_and_saves_the_same(corpus: Path, tmp_path: Path) -> None:
    start = [FROZEN, f"run.directory={tmp_path / 'start'}"]
    source, _ = run_ranks(work, 1, corpus, start, None, 2)[0]
    before = tensors_of(source)
    assert {name for name in before if is_of_image(name) and not name.startswith("weight/")} == (
        set()
    )
    assert len([name for name in before if is_of_image(name)]) == 17  # 8 per layer, and one norm
    _, expected = run_ranks(work, 1, corpus, [FROZEN, f"run.directory={tmp_path}"], source, 2)[0]
    for number, layout in enumerate([TP2, PP2, MP2, ZERO3, OFFLOAD]):
        overrides = [FROZEN, *layout, f"run.directory={tmp_path / str(number)}"]
        same, _ = run_ranks(work, 2, corpus, overrides, source, 0)[0]
        after = tensors_of(same)
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before), layout
        stored = CheckpointSource(same.path)
        Layout.of(stored.config, 2).files(stored.infos)  # as mot checkpoint reshard reads it
        for _, losses in run_ranks(work, 2, corpus, overrides, same, 2):
            for mine, theirs in zip(losses, expected, strict=True):
                assert mine == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("layout", [ZERO3, MP2, ["training.precision=bf16"]])
def test_a_tower_is_frozen_when_the_run_resumes(
    corpus: Path, tmp_path: Path, layout: list[str]
) -> None:
    """In bf16, the frozen weights keep the values that forward reads."""
    folder = f"run.directory={tmp_path}"
    source, _ = run_ranks(work, 2, corpus, [*layout, folder], None, 2)[0]
    frozen, _ = run_ranks(work, 2, corpus, [*layout, FROZEN, folder], source, 2)[0]
    before, after = tensors_of(source), tensors_of(frozen)
    assert before.keys() - after.keys() == {
        name for name in before if is_of_image(name) and not name.startswith("weight/")
    }
    for name, values in after.items():
        read = before[name].bfloat16().float() if "bf16" in layout[0] else before[name]
        assert torch.equal(values, read) == is_of_image(name), name


def train(corpus_directory: Path, overrides: list[str]) -> str | None:
    """Train; return the error, if any."""
    corpus = Corpus.open(corpus_directory)
    config = resolve_config(small_config(corpus_directory, overrides), corpus)
    try:
        loop.train(config, corpus, build_groups(config, corpus, torch.device("cpu")))
    except UserError as error:
        return str(error)
    return None


def test_unfreezing_takes_a_new_run_and_rates_are_logged(corpus: Path, tmp_path: Path) -> None:
    folder = f"run.directory={tmp_path}"
    slow = "model.towers.text.lr_mult=0.5"
    settings = [FROZEN, slow, folder, "training.train_steps=2", "logging.interval_steps=1"]
    assert run_ranks(train, 1, corpus, settings) == [None]
    events = EventAccumulator(str(tmp_path / "small" / "tensorboard"), {"scalars": 0}).Reload()
    rates, of_text, norms = (
        [point.value for point in events.Scalars(tag)]
        for tag in ("learning_rate", "learning_rate/tower_text", "gradient_norm/tower_image")
    )
    assert of_text == pytest.approx([rate / 2 for rate in rates])
    assert norms == [0, 0]
    thawed = [folder, "training.train_steps=3"]
    (error,) = run_ranks(train, 1, corpus, thawed)
    assert error is not None
    assert error.startswith("model.towers.image.frozen = false, but the tower was frozen in the")
    assert "\n" not in error
    new = [*thawed, "run.name=new", f"run.initialize_from={tmp_path / 'small'}"]
    assert run_ranks(train, 1, corpus, new) == [None]
