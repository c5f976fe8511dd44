"""A resharded checkpoint is the one that a job saves, and training resumes from it alike.

One process trains. Its checkpoint is laid out for every layout, and from each laid out for every
other: 12 pairs. The ranks of each layout resume from all of them, with the same losses bitwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from mot_megatron.checkpoint import CheckpointInfo, open_checkpoint
from mot_megatron.cli.checkpoint_weights import main as weights
from mot_megatron.config import Config
from mot_megatron.data.corpus import Corpus
from mot_megatron.errors import CheckpointError
from mot_megatron.train.session import build_groups, build_session, resolve_config
from mot_megatron.train.state import Progress, restore, save
from mot_megatron.train.step import train_step
from mot_megatron.train.trained import load_trained_model
from tests.conversion.states import resharded
from tests.ranks import run_ranks
from tests.small_runs import small_config, write_corpus

pytestmark = pytest.mark.slow

# Tokens choose their experts and none is dropped, so routing does not depend on the layout.
MODEL = [
    "model.num_layers=4",
    "model.towers.text.experts={num_moe_experts=4,routing='topk',topk=2}",
]
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "zero3": (2, ["parallel.zero_stage=3"]),
    "pieces": (
        2,
        [
            "parallel.pipeline_model_parallel_size=2",
            "parallel.virtual_pipeline_model_parallel_size=2",
        ],
    ),
    "modality": (
        2,
        [
            "parallel.modality_parallel_size=2",
            "parallel.attention_exchange=heads",
            "parallel.zero_stage=2",
        ],
    ),
    "experts": (
        4,
        [
            "parallel.expert_model_parallel_size=2",
            "parallel.tensor_model_parallel_size=2",
            "parallel.sequence_parallel=true",
        ],
    ),
}


@dataclass(frozen=True)
class Resumed:
    losses: dict[str, list[tuple[float, ...]]]
    """Losses of two steps after restoring each checkpoint."""
    saved: CheckpointInfo
    refused: str
    """The error of restoring weights alone."""


def configure(corpus: Path, runs: Path, layout: list[str]) -> Config:
    overrides = [f"run.directory={runs}", *MODEL, *layout]
    return resolve_config(small_config(corpus, overrides), Corpus.open(corpus))


def train_and_save(corpus: Path, runs: Path) -> CheckpointInfo:
    config, opened = configure(corpus, runs, []), Corpus.open(corpus)
    session = build_session(config, opened, build_groups(config, opened, torch.device("cpu")))
    for step in range(2):
        train_step(session, step=step + 1, learning_rate=1e-2)
    return save(session, Progress(steps=2))


def resume(
    corpus: Path, runs: Path, layout: list[str], checkpoints: dict[str, Path], bare: Path
) -> Resumed:
    config, opened = configure(corpus, runs, layout), Corpus.open(corpus)
    session = build_session(config, opened, build_groups(config, opened, torch.device("cpu")))
    losses = {}
    saved = None
    for name, path in checkpoints.items():
        checkpoint = open_checkpoint(path).checkpoint
        assert checkpoint is not None
        progress = restore(session, checkpoint)
        saved = saved or save(session, progress)
        losses[name] = [
            train_step(session, step=step, learning_rate=1e-2).modality_losses for step in (3, 4)
        ]
    only_weights = open_checkpoint(bare).checkpoint
    assert only_weights is not None
    assert saved is not None
    with pytest.raises(CheckpointError) as caught:
        restore(session, only_weights)
    return Resumed(losses, saved, str(caught.value))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "small")


@pytest.fixture(scope="module")
def original(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("original")
    (info,) = run_ranks(train_and_save, 1, corpus, runs)
    return info.path


@pytest.fixture(scope="module")
def laid_out(
    corpus: Path, original: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Return the checkpoint as the ranks of every layout would have saved it."""
    folder = tmp_path_factory.mktemp("laid-out")
    return {
        name: resharded(original, folder / name, world_size, configure(corpus, folder, layout)).path
        for name, (world_size, layout) in LAYOUTS.items()
    }


@pytest.mark.parametrize("target", LAYOUTS)
def test_resume_in_another_layout(
    corpus: Path, original: Path, laid_out: dict[str, Path], tmp_path: Path, target: str
) -> None:
    world_size, layout = LAYOUTS[target]
    checkpoints = {"original": original}
    for source, path in laid_out.items():
        if source != target:
            wanted = configure(corpus, tmp_path, layout)
            info = resharded(path, tmp_path / source, world_size, wanted)
            checkpoints[f"{source} to {target}"] = info.path
            # Whichever layout it came from, it is the same in every byte.
            for file in laid_out[target].iterdir():
                assert (info.path / file.name).read_bytes() == file.read_bytes(), file.name
    assert weights([str(original), str(tmp_path / "bare")]) == 0
    runs = tmp_path / "runs"
    outcomes = run_ranks(
        resume, world_size, corpus, runs, layout, checkpoints, tmp_path / "bare", timeout=240
    )
    for outcome in outcomes:
        assert len(outcome.losses) == 4
        assert all(losses == outcome.losses["original"] for losses in outcome.losses.values())
        assert "has weights only, no optimizer state" in outcome.refused
    # What the ranks save themselves is what resharding wrote.
    for file in laid_out[target].glob("*.distcp"):
        assert (outcomes[0].saved.path / file.name).read_bytes() == file.read_bytes(), file.name


def test_weights_alone_are_used(corpus: Path, original: Path, tmp_path: Path) -> None:
    """Evaluation, generation and upcycling load models this way."""
    device = torch.device("cpu")
    whole = dict(load_trained_model(original, device).model.named_parameters())
    for dtype in ("fp32", "bf16"):
        assert weights([str(original), str(tmp_path / dtype), "--dtype", dtype]) == 0
        loaded = load_trained_model(tmp_path / dtype, device)
        assert loaded.corpus.directory == corpus
        for name, value in loaded.model.named_parameters():
            expected = whole[name].bfloat16().float() if dtype == "bf16" else whole[name]
            assert torch.equal(value, expected), name
