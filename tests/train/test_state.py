"""A step that overflowed is never saved as a good one."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from mot_megatron.data.corpus import Corpus
from mot_megatron.errors import TrainingError
from mot_megatron.parallel.groups import build_process_groups
from mot_megatron.train import state
from mot_megatron.train.session import build_session, resolve_config
from mot_megatron.train.state import Progress, checkpoint_directory, restore, save
from tests.ranks import run_ranks
from tests.train.small_runs import small_config, write_corpus

BROKEN = "layers.1.feed_forward.towers.2.down.linear.weight"


def save_with_one_rank_broken(corpus_directory: Path, runs: Path) -> tuple[str, list[Path]]:
    config = small_config(
        corpus_directory,
        [f"run.directory={runs}", "parallel.tensor_model_parallel_size=2"],
    )
    corpus = Corpus.open(corpus_directory)
    config = resolve_config(config, corpus)
    groups = build_process_groups(2, torch.device("cpu"))
    session = build_session(config, corpus, groups)
    save(session, Progress(steps=1))
    state = dict(session.engine.export_state())
    if groups.tensor_rank == 1:
        state[BROKEN]["weight"][0, 0] = torch.inf
    session.engine.import_state(state, optimizer_steps=1)
    with pytest.raises(TrainingError) as raised:
        save(session, Progress(steps=2))
    return str(raised.value), sorted(checkpoint_directory(config.run_directory).iterdir())


def test_infinite_weight_on_one_rank_is_refused_by_all(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    for message, checkpoints in run_ranks(save_with_one_rank_broken, 2, corpus, tmp_path / "runs"):
        assert message.startswith(f"step 2: {BROKEN} or its optimizer state is not finite;")
        assert [path.name for path in checkpoints] == ["step_00000001"]


def restore_with_and_without_flops(corpus_directory: Path, runs: Path) -> tuple[Progress, Progress]:
    corpus = Corpus.open(corpus_directory)
    config = resolve_config(small_config(corpus_directory, [f"run.directory={runs}"]), corpus)
    session = build_session(config, corpus, build_process_groups(1, torch.device("cpu")))
    checkpoint = save(session, Progress(steps=1, seconds=2.0, tokens=3, flops=4e9))
    counted = restore(session, checkpoint)
    metadata = state.read_metadata(checkpoint)
    del metadata["progress"]["flops"]
    state.read_metadata = lambda _: metadata
    return counted, restore(session, checkpoint)


def test_flops_of_a_checkpoint_from_before_they_were_counted_are_unknown(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    ((counted, uncounted),) = run_ranks(
        restore_with_and_without_flops, 1, corpus, tmp_path / "runs"
    )
    assert counted == Progress(steps=1, seconds=2.0, tokens=3, flops=4e9)
    assert (uncounted.steps, uncounted.tokens) == (1, 3)
    assert math.isnan(uncounted.flops)
