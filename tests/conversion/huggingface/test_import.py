"""Models of the transformers library, and BAGEL, come in as runs with the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from mot_megatron.checkpoint import read_whole_tensors
from mot_megatron.cli.checkpoint import main
from mot_megatron.conversion.source import CheckpointSource
from mot_megatron.data.corpus import Corpus
from mot_megatron.model.model import MixtureOfTransformers
from mot_megatron.parallel.groups import build_single_process_groups
from mot_megatron.train.session import build_groups, build_session
from mot_megatron.train.state import load_weights, restore
from mot_megatron.train.step import train_step
from mot_megatron.train.trained import SavedRun
from tests.conversion.huggingface.exported import (
    CHOSEN,
    DENSE,
    PRE,
    TOP2,
    own_logits,
    random_ids,
    random_model,
    save_run,
)
from tests.ranks import run_ranks
from tests.small_corpus import make_config, make_corpus

TOLERANCE = 1e-5
SHAPES: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
    "max_position_embeddings": 160,
}
RUN = """
[run]
name = "imported"
[data]
seq_length = 160
[model.modalities]
text = { tower = "text" }
image = { tower = "image" }
speech = { tower = "speech" }
[training]
train_steps = 1
global_batch_size = 2
precision = "fp32"
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def command(folder: Path, source: Path, corpus: Corpus, *more: str) -> list[str]:
    config = folder / "run.toml"
    config.write_text(RUN)
    settings = [f'run.directory="{folder}/runs"', f'data.corpus="{corpus.directory}"']
    settings += [setting for setting in more if not setting.startswith("-")]
    flags = [flag for flag in more if flag.startswith("-")]
    sets = [part for setting in settings for part in ("--set", setting)]
    return ["from-hf", str(source), "--config", str(config), *sets, *flags]


def loaded(folder: Path) -> MixtureOfTransformers:
    """Load the model of the imported run."""
    source = CheckpointSource(folder / "runs" / "imported")
    model = MixtureOfTransformers(source.config, build_single_process_groups(torch.device("cpu")))
    load_weights(model, source.checkpoint, None)
    return model


def vary(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize(
    ("config", "towers"),
    [
        (Qwen3Config(**SHAPES, rope_parameters={"rope_type": "default", "rope_theta": 5e4}), []),
        (LlamaConfig(**SHAPES, tie_word_embeddings=True), DENSE),
        (Qwen2Config(**SHAPES, rms_norm_eps=1e-5), [TOP2.replace(",capacity_factor=1.0", "")]),
    ],
    ids=["qwen3", "llama", "qwen2"],
)
def test_dense_model_into_all_towers(
    tmp_path: Path, corpus: Corpus, config: PretrainedConfig, towers: list[str]
) -> None:
    torch.manual_seed(1)
    theirs = AutoModelForCausalLM.from_config(config).eval()
    vary(theirs)
    theirs.save_pretrained(tmp_path / "source", max_shard_size="40KB")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 1
    assert main(command(tmp_path, tmp_path / "source", corpus, *towers, "--verify")) == 0
    ids = random_ids(7, corpus, (2, 20))
    model = loaded(tmp_path)
    assert model.config.num_towers == (1 if towers == DENSE else 3)
    with torch.no_grad():
        expected = theirs(ids).logits
    actual = own_logits(model, corpus, ids)
    assert (actual - expected).abs().max() < TOLERANCE * max(1, expected.abs().max())


@pytest.mark.parametrize(
    "overrides",
    [[*DENSE, PRE], [CHOSEN, TOP2, "model.add_qkv_bias=true"], [PRE, "model.untied.norms=false"]],
)
def test_export_comes_back_bitwise(
    tmp_path: Path, corpus: Corpus, overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(corpus, *overrides, f'run.directory="{tmp_path}"')
    run = save_run(random_model(config), config, corpus)
    assert (
        main(["to-hf", str(run), str(tmp_path / "out"), "--max-shard-size", "60KB", "--verify"])
        == 0
    )
    towers = DENSE if overrides[: len(DENSE)] == DENSE else []
    assert main(command(tmp_path, tmp_path / "out", corpus, *towers, "--verify")) == 0
    before, after = CheckpointSource(run), CheckpointSource(tmp_path / "runs" / "imported")
    names = [name for name in before.infos if name.startswith("weight/")]
    assert before.infos.keys() == after.infos.keys()
    old = read_whole_tensors(before.checkpoint, names)
    new = read_whole_tensors(after.checkpoint, names)
    assert [name for name in names if not torch.equal(old[name], new[name])] == []
    out = capsys.readouterr().out
    assert f"left out: {len(names)} tensors, exp_avg of the optimizer" in out
    assert "0 of them new; matched by id, because both have the same vocabulary" in out


def continued(folder: Path) -> tuple[int, tuple[float, ...]]:
    """Restore the imported run on this rank and train a step; return its first and last step."""
    saved = SavedRun.open(folder / "runs" / "imported")
    corpus = Corpus.open(saved.config.data.folders[0])
    groups = build_groups(saved.config, corpus, torch.device("cpu"))
    session = build_session(saved.config, corpus, groups)
    progress = restore(session, saved.checkpoint)
    result = train_step(session, step=progress.steps + 1, learning_rate=1e-4)
    return progress.steps, result.modality_bits


@pytest.mark.slow
def test_training_continues_from_an_import(tmp_path: Path, corpus: Corpus) -> None:
    theirs = AutoModelForCausalLM.from_config(Qwen2Config(**SHAPES))
    theirs.save_pretrained(tmp_path / "source")
    assert main(command(tmp_path, tmp_path / "source", corpus)) == 0
    config = tmp_path / "runs" / "imported" / "config.toml"
    assert "add_qkv_bias = true" in config.read_text()
    ((steps, bits),) = run_ranks(continued, 1, tmp_path)
    assert steps == 0
    assert all(0 < each < 40 for each in bits)
