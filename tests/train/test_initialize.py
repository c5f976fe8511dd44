"""A run that begins with the weights of another: in any layout, and only if both fit together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mot_megatron.checkpoint import open_checkpoint
from mot_megatron.checkpoint.find import CheckpointInfo
from mot_megatron.checkpoint.load import read_whole_tensors
from mot_megatron.checkpoint.names import checkpoint_directory
from mot_megatron.checkpoint.storage import read_index, stored_tensors
from mot_megatron.cli import checkpoint_weights
from mot_megatron.data.corpus import Corpus, Modality
from mot_megatron.data.writer import CorpusWriter
from mot_megatron.errors import UserError
from mot_megatron.run import loop
from mot_megatron.train.initialize import initialize_from_checkpoint
from mot_megatron.train.session import build_groups, build_session, resolve_config
from mot_megatron.train.state import Progress, save
from tests.ranks import run_ranks
from tests.small_runs import MODALITIES, SEQ_LENGTH, small_config, write_corpus

pytestmark = pytest.mark.slow

EXPERTS = "model.towers.text.experts={num_moe_experts=2}"
TP2 = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
PP2 = ["parallel.pipeline_model_parallel_size=2"]
MP2 = ["parallel.modality_parallel_size=2"]
ZERO3 = ["parallel.zero_stage=3"]


def train(corpus_directory: Path, overrides: list[str]) -> str | None:
    """Train; return the error, if any."""
    corpus = Corpus.open(corpus_directory)
    config = resolve_config(small_config(corpus_directory, overrides), corpus)
    try:
        loop.train(config, corpus, build_groups(config, corpus, torch.device("cpu")))
    except UserError as error:
        return str(error)
    return None


def begin(corpus_directory: Path, overrides: list[str]) -> CheckpointInfo:
    """Begin a run with the weights of another, and save it before its first step."""
    corpus = Corpus.open(corpus_directory)
    config = resolve_config(small_config(corpus_directory, [EXPERTS, *overrides]), corpus)
    session = build_session(config, corpus, build_groups(config, corpus, torch.device("cpu")))
    initialize_from_checkpoint(session)
    assert session.engine.optimizer_steps == 0
    return save(session, Progress())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three steps, beside its corpus."""
    folder = tmp_path_factory.mktemp("trained")
    corpus = write_corpus(folder / "corpus")
    overrides = [EXPERTS, f"run.directory={folder}", "training.train_steps=3"]
    assert run_ranks(train, 1, corpus, overrides) == [None]
    return folder / "small"


def tensors_of(checkpoint: CheckpointInfo) -> dict[str, torch.Tensor]:
    return read_whole_tensors(checkpoint, stored_tensors(read_index(checkpoint.path)).keys())


@pytest.mark.parametrize("layout", [TP2, PP2, MP2, ZERO3], ids=["TP2", "PP2", "MP2", "ZeRO-3"])
def test_weights_are_the_same_in_any_layout(
    trained: Path, tmp_path: Path, layout: list[str]
) -> None:
    """The other corpus has other documents, and none with speech."""
    corpus = write_corpus(tmp_path / "corpus", without="speech")
    overrides = [f"run.directory={tmp_path}", "run.name=other", f"run.initialize_from={trained}"]
    checkpoint = run_ranks(begin, 2, corpus, [*overrides, *layout])[0]
    found = open_checkpoint(checkpoint_directory(trained)).checkpoint
    assert found is not None
    before, after = tensors_of(found), tensors_of(checkpoint)
    assert before.keys() == after.keys()
    for name, values in after.items():
        if name.startswith("weight/"):
            assert torch.equal(values, before[name]), name
        else:
            assert not values.any(), name


def test_a_run_is_trained_and_continued(trained: Path, tmp_path: Path) -> None:
    """It begins with exported bf16 weights, and no longer needs them once it has a checkpoint."""
    weights = tmp_path / "weights"
    assert checkpoint_weights.main([str(trained), str(weights), "--dtype", "bf16"]) == 0
    corpus = write_corpus(tmp_path / "corpus", without="speech")
    overrides = [EXPERTS, f"run.directory={tmp_path}", "run.name=other"]
    for steps, source in ((2, weights), (4, tmp_path / "nowhere")):
        given = [f"run.initialize_from={source}", f"training.train_steps={steps}"]
        assert run_ranks(train, 1, corpus, [*overrides, *given]) == [None]
        checkpoint = open_checkpoint(checkpoint_directory(tmp_path / "other")).checkpoint
        assert checkpoint is not None
        assert checkpoint.step == steps


def test_what_does_not_fit_is_one_line(trained: Path, tmp_path: Path) -> None:
    own = trained.parent / "corpus"
    other = tmp_path / "other"
    larger = (MODALITIES[0].model_copy(update={"size": 101}), *MODALITIES[1:])
    moved = [
        Modality(name=m.name, first_id=m.first_id + (m.name != "text"), size=m.size) for m in larger
    ]
    with CorpusWriter(
        directory=other, name="o", builder="tests 1", seed=0, modalities=moved, pad_token=0
    ) as writer:
        for split in ("train", "validation"):
            writer.add(split, [("text", range(SEQ_LENGTH // 2))])
    cases = [
        (own, [EXPERTS], tmp_path / "nowhere", "run.initialize_from = .*nowhere"),
        (
            other,
            [EXPERTS],
            trained,
            "another corpus than .*other.*size of modality text is 100 in the checkpoint and 101",
        ),
        (own, [EXPERTS, "model.num_layers=1"], trained, "layers.1"),
    ]
    for number, (corpus, model, source, message) in enumerate(cases):
        overrides = [*model, f"run.directory={tmp_path}", f"run.name=case-{number}"]
        overrides.append(f"run.initialize_from={source}")
        errors = run_ranks(train, 2, corpus, overrides)
        assert errors[0] == errors[1]
        assert errors[0] is not None
        assert "\n" not in errors[0]
        with pytest.raises(UserError, match=message):
            raise UserError(errors[0])
        assert not (tmp_path / f"case-{number}").exists()
