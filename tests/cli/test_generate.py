"""Tests of the routing of models whose experts depend on later tokens; see also test_trained."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from mot_megatron.cli.generate import main
from mot_megatron.data.corpus import Corpus
from tests.cli.console import only_error
from tests.compare.synthetic_runs import write_run
from tests.small_corpus import make_corpus
from tests.train.test_trained import save_step
from tools import draw_samples

CHOICE = "model.towers.text.experts={num_moe_experts=4,causal_router=true}"
CAPACITY = 'model.towers.text.experts={num_moe_experts=4,routing="topk",capacity_factor=1.0}'


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("generate") / "corpus")


def arguments(folder: Path, corpus: Corpus, *overrides: str) -> list[str]:
    """Save a checkpoint of a new model, and return the arguments to generate from it."""
    save_step(folder / "run", corpus, 1, *overrides)
    options = ["--output", str(folder / "out"), "--prompt", "a", "--into", "image"]
    return ["--checkpoint", str(folder / "run"), *options]


@pytest.mark.parametrize(
    ("overrides", "note"),
    [
        ((CHOICE,), "tokens are routed by the causal router"),
        ((CAPACITY,), "tokens are routed without a capacity limit: no expert drops tokens"),
        ((), None),
    ],
)
def test_the_routing_note_is_printed(
    corpus: Corpus,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    overrides: tuple[str, ...],
    note: str | None,
) -> None:
    assert main(arguments(tmp_path, corpus, *overrides)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("tokens are routed")] == (
        [note] if note else []
    )
    assert any((tmp_path / "out").iterdir())


def test_expert_choice_without_a_causal_router_is_an_error(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blind = CHOICE.replace("true", "false")
    assert main(arguments(tmp_path, corpus, blind)) == 2
    line = only_error(capsys.readouterr().err)
    assert line.startswith("error: model.towers.text.experts.causal_router = false: its experts")
    assert not (tmp_path / "out").exists()


def test_losses_and_pictures_are_drawn(corpus: Corpus, tmp_path: Path) -> None:
    losses = {
        f"loss_{split}/{modality}": {10: 5.0, 20: 4.0}
        for split in ("train", "held_out")
        for modality in ("text", "image")
    }
    write_run(tmp_path, "run", losses)
    save_step(tmp_path / "run", corpus, 1)
    picture = tmp_path / "samples.png"
    prompts = ["--prompt", "a", "--prompt", "bc", "--samples", "2"]
    assert draw_samples.main([str(tmp_path / "run"), "--output", str(picture), *prompts]) == 0
    with Image.open(picture) as drawn:
        assert drawn.width > 1000
        assert len(drawn.convert("RGB").getcolors(drawn.width * drawn.height) or []) > 50


def test_a_refused_prompt_leaves_no_folder(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*arguments(tmp_path, corpus), "--language", "xx"]
    assert main(words) == 2
    assert "language 'xx'" in only_error(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
