"""Tests that the data benchmark runs, and that its JSON output is valid."""

import json
from pathlib import Path

import pytest

from mot_megatron.benchmark import data_path
from mot_megatron.cli import benchmark_data
from tests.cli.console import only_error
from tests.data.corpora import random_documents, write_corpus


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_path, "PACKED_DOCUMENTS", 2000)
    monkeypatch.setattr(data_path, "CORPUS_DOCUMENTS", 50)
    monkeypatch.setattr(data_path, "BUDGET_DOCUMENTS", 2000)


def test_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark_data.main(["--json", "--repeats", "3", "--step-seconds", "2"]) == 0
    result = json.loads(capsys.readouterr().out)
    packing = result["packing"]["synthetic"]
    assert packing["documents"] == 2000
    assert 0.98 < packing["fill"] <= 1
    budget = result["budget_packing"]["synthetic"]
    assert sum(budget["budgets"]) == 512 * 8
    assert 0.95 < budget["fill"] <= 1  # with few documents, the last micro-batch matters
    for ratio, figure, factor in [
        (result["ratio_to_goal"]["synthetic"], packing["documents_per_second"], 1 / 2e6),
        (result["ratio_to_step"], result["batch_preparation"]["seconds_per_micro_batch"], 1 / 2),
    ]:
        assert ratio["low"] <= ratio["median"] <= ratio["high"]
        assert ratio["median"] == pytest.approx(figure["median"] * factor)
    assert result["machine"]["cores"] >= 1


def test_a_corpus_is_packed_and_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_corpus(tmp_path / "corpus", train=random_documents(60, 30))
    options = ["--corpus", str(tmp_path / "corpus"), "--repeats", "1", "--seq-length", "64"]
    assert benchmark_data.main([*options, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["packing"]["corpus"]["documents"] == 60
    assert result["budget_packing"]["corpus"]["documents"] == 60
    assert result["batch_preparation"]["corpus"] == "tiny"
    assert benchmark_data.main([*options, "--step-seconds", "1"]) == 0
    assert "preparing 512 tokens of tiny" in capsys.readouterr().out


def test_a_bad_corpus_gives_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark_data.main(["--corpus", str(tmp_path / "none"), "--repeats", "1"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    error = only_error(printed.err)
    assert error.startswith(f"error: {tmp_path / 'none' / 'corpus.toml'}: No such file")
