"""Models go to megatron-core and come from it with the same logits, and there and back bitwise."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from mot_megatron.checkpoint import read_whole_tensors
from mot_megatron.cli.checkpoint import main
from mot_megatron.conversion.megatron.export import model_arguments
from mot_megatron.conversion.source import CheckpointSource
from mot_megatron.data.corpus import Corpus
from tests.conversion.huggingface.exported import (
    BIASES,
    DENSE,
    NO_QK_NORM,
    PRE,
    TIED,
    own_logits,
    random_ids,
    random_model,
    save_run,
)
from tests.conversion.huggingface.test_import import RUN, loaded
from tests.conversion.megatron.gpt import load_on_rank, save_again_on_ranks, save_on_rank
from tests.ranks import run_ranks
from tests.small_corpus import make_config, make_corpus

TOLERANCE = 1e-5
STATED = ["model.norm_eps=1e-5", "model.rotary_base=10000.0"]
HEADS = ["model.num_attention_heads=4", "model.num_query_groups=2"]
KINDS = {
    "norms": [],
    "biases": [NO_QK_NORM, BIASES, TIED, "model.rotary_base=5e4", "model.norm_eps=1e-3"],
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def command(folder: Path, source: Path, corpus: Corpus, *settings: str) -> list[str]:
    (folder / "run.toml").write_text(RUN)
    places = [f'run.directory="{folder}/runs"', f'data.corpus="{corpus.directory}"']
    sets = [part for setting in (*places, *settings) for part in ("--set", setting)]
    return ["from-megatron", str(source), "--config", str(folder / "run.toml"), *sets, "--verify"]


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual - expected).abs().max() < TOLERANCE * max(1, expected.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_loads_into_a_gpt_model_and_comes_back_bitwise(
    tmp_path: Path, corpus: Corpus, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(corpus, *DENSE, PRE, *KINDS[kind], f'run.directory="{tmp_path}"')
    model = random_model(config)
    run = save_run(model, config, corpus)
    assert main(["to-megatron", str(run), str(tmp_path / "out"), "--verify"]) == 0
    ids = random_ids(7, corpus, (2, 20))
    (actual,) = run_ranks(load_on_rank, 1, str(tmp_path / "out"), ids)
    assert_close(actual, own_logits(model, corpus, ids))

    again = tmp_path / "again"
    run_ranks(save_again_on_ranks, 2, str(tmp_path / "out"), str(again))
    assert len(list(again.glob("*.distcp"))) > 2
    stated = [*HEADS, *STATED, *KINDS[kind]]
    assert main(command(tmp_path, again, corpus, *DENSE, *stated)) == 0
    before, after = CheckpointSource(run), CheckpointSource(tmp_path / "runs" / "imported")
    names = [name for name in before.infos if name.startswith("weight/")]
    assert before.infos.keys() == after.infos.keys()
    old = read_whole_tensors(before.checkpoint, names)
    new = read_whole_tensors(after.checkpoint, names)
    assert [name for name in names if not torch.equal(old[name], new[name])] == []
    out = capsys.readouterr().out
    assert f"left out: {len(names)} tensors, exp_avg of the optimizer" in out
    assert "left out: 8 entries, objects named _extra_state, which are pickles" in out


LAYOUTS: dict[str, dict[str, Any]] = {
    "stacked": {},
    "layers": {"non_homogeneous_layers": True},
    "halves": {"singleton_local_shards": True},
}


@pytest.mark.parametrize(("kind", "layouts"), [("norms", LAYOUTS), ("biases", ["stacked"])])
def test_a_gpt_model_becomes_a_run(
    tmp_path: Path, corpus: Corpus, kind: str, layouts: Iterable[str]
) -> None:
    settings = [*DENSE, PRE, *KINDS[kind]]
    arguments = model_arguments(make_config(corpus, *settings))
    ids = random_ids(3, corpus, (2, 20))
    folders = {str(tmp_path / name / "source"): LAYOUTS[name] for name in layouts}
    (expected,) = run_ranks(save_on_rank, 1, arguments, folders, ids)
    for name in layouts:
        folder = tmp_path / name
        towers = DENSE if name == "stacked" else []
        stated = [*HEADS, *STATED, *KINDS[kind]] if kind == "biases" else STATED
        assert main(command(folder, folder / "source", corpus, *towers, *stated)) == 0
        model = loaded(folder)
        assert model.config.num_towers == (1 if towers else 3)
        assert_close(own_logits(model, corpus, ids), expected)
