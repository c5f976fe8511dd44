"""A step that overflowed is never saved as a good one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mot_megatron.data.corpus import Corpus
from mot_megatron.errors import TrainingError
from mot_megatron.parallel.groups import build_process_groups
from mot_megatron.train.session import build_session, resolve_config
from mot_megatron.train.state import Progress, checkpoint_directory, save
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
