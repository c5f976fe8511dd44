"""Tests of the text and JSON output of ``mot prepare`` and ``mot inspect``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mot_megatron.cli import inspect, prepare
from mot_megatron.data.corpus import Corpus
from tests.cli.console import only_error
from tests.small_corpus import make_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpora") / "corpus")


def test_prepare_prints_counts(
    corpus: Corpus, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "build", lambda _: corpus)
    assert prepare.main(["openmoji", "--output", "x", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    train = corpus.description.splits["train"]
    assert document["splits"]["train"]["tokens"] == train.tokens
    assert prepare.main(["openmoji", "--output", "x"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"train: {train.documents:,} documents, {train.tokens:,} tokens (")
    assert lines[-1].startswith("x: complete after ")


def test_inspect(corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(corpus.directory), "--output", str(tmp_path), "--examples", "2"]
    assert inspect.main([*command, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["splits"].keys() == corpus.description.splits.keys()
    assert len(document["examples"]) == 2
    assert all(0 < fill <= 1 for fill in document["fill"].values())
    assert (tmp_path / "contact_sheet.png").is_file()
    assert inspect.main(command) == 0
    printed = capsys.readouterr().out
    for modality in corpus.description.modalities:
        assert f"  {modality.name}: ids {modality.first_id}..{modality.end_id - 1}," in printed
    assert inspect.main([*command, "--seq-length", "2"]) == 2
    assert "the longest document of split" in only_error(capsys.readouterr().err)
