"""Saved state: only finite values, and each expert under its own name in every layout."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from mot_megatron.checkpoint.find import CheckpointInfo
from mot_megatron.checkpoint.load import read_whole_tensors
from mot_megatron.checkpoint.names import checkpoint_directory
from mot_megatron.checkpoint.storage import read_index, stored_tensors
from mot_megatron.data.corpus import Corpus
from mot_megatron.errors import TrainingError
from mot_megatron.parallel.groups import build_process_groups
from mot_megatron.train import state
from mot_megatron.train.session import build_groups, build_session, resolve_config
from mot_megatron.train.state import Progress, restore, save
from mot_megatron.train.step import train_step
from tests.ranks import run_ranks
from tests.small_runs import small_config, write_corpus

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


def test_infinite_weight_on_one_rank_is_an_error_on_all_ranks(tmp_path: Path) -> None:
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


def test_flops_are_nan_after_restoring_a_checkpoint_without_them(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    ((counted, uncounted),) = run_ranks(
        restore_with_and_without_flops, 1, corpus, tmp_path / "runs"
    )
    assert counted == Progress(steps=1, seconds=2.0, tokens=3, flops=4e9)
    assert (uncounted.steps, uncounted.tokens) == (1, 3)
    assert math.isnan(uncounted.flops)


EXPERTS = "model.towers.text.experts={num_moe_experts=4,causal_router=true}"
EP2, EP4 = (f"parallel.expert_model_parallel_size={size}" for size in (2, 4))
TP2 = ("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true")


def pass_on(
    corpus_directory: Path, overrides: list[str], source: CheckpointInfo | None
) -> tuple[CheckpointInfo, int]:
    """Restore ``source`` or train two steps; return a new checkpoint and the optimizer steps."""
    corpus = Corpus.open(corpus_directory)
    config = resolve_config(small_config(corpus_directory, [EXPERTS, *overrides]), corpus)
    session = build_session(config, corpus, build_groups(config, corpus, torch.device("cpu")))
    if source is None:
        for step in range(2):
            train_step(session, step=step + 1, learning_rate=1e-2)
    else:
        restore(session, source)
    return save(session, Progress(steps=2)), session.engine.optimizer_steps


@pytest.mark.slow
def test_experts_keep_their_names_in_every_layout(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    source, first = None, {}
    for number, (world_size, layout) in enumerate(
        [(2, [EP2]), (4, [EP4]), (2, TP2), (1, []), (2, [EP2])]
    ):
        overrides = [*layout, f"run.directory={tmp_path / str(number)}"]
        outcomes = run_ranks(pass_on, world_size, corpus, overrides, source)
        source = outcomes[0][0]
        assert {steps for _, steps in outcomes} == {2}
        names = stored_tensors(read_index(source.path)).keys()
        values = read_whole_tensors(source, names)
        if not first:
            first = values
        assert values.keys() == first.keys()
        assert all(torch.equal(values[name], first[name]) for name in first), layout
    tower = "layers.1.feed_forward.towers.0"
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        found = {name for name in first if name.startswith(f"{kind}/{tower}.")}
        of_experts = [f"experts.{e}.{part}" for e in range(4) for part in ("gate_up", "down")]
        of_router = ["router.weight", "router.causal.hidden", "router.causal.output"]
        assert found == {f"{kind}/{tower}.{part}" for part in of_experts + of_router}
        # The shape is that of a plain feed-forward network, as upcycling requires.
        plain = f"{kind}/layers.1.feed_forward.towers.1.gate_up.linear.weight"
        assert first[f"{kind}/{tower}.experts.3.gate_up"].shape == first[plain].shape
    weights = [first[f"weight/{tower}.experts.{e}.down"] for e in range(4)]
    assert not any(torch.equal(weights[0], other) for other in weights[1:])
