"""``to-hf`` and ``from-hf``: errors in one line, kills, full disks and peak memory."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mot_megatron.checkpoint.names import WEIGHT_PREFIX
from mot_megatron.cli.checkpoint import main
from mot_megatron.conversion.huggingface import safetensors_files
from mot_megatron.conversion.source import CheckpointSource
from mot_megatron.data.corpus import Corpus
from tests.conversion.huggingface.exported import DENSE, PRE, random_model, save_run
from tests.conversion.huggingface.processes import GROWTH_FILE
from tests.conversion.huggingface.test_import import RUN
from tests.small_corpus import make_config, make_corpus

MEGABYTE = 1 << 20


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, corpus: Corpus) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    config = make_config(corpus, *DENSE, PRE, f'run.directory="{folder}"')
    return save_run(random_model(config), config, corpus)


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Run a command that fails, and return its error without progress lines."""
    assert main([str(argument) for argument in arguments]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


@pytest.fixture(scope="module")
def process(
    tmp_path_factory: pytest.TempPathFactory, run: Path, corpus: Corpus
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Run ``measured_then_killed`` in a new process, and return its folder."""
    folder = tmp_path_factory.mktemp("process")
    code = (
        "import sys; from tests.conversion.huggingface.processes import measured_then_killed;"
        "measured_then_killed(*sys.argv[1:])"
    )
    arguments = [str(run), str(corpus.directory), str(folder)]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300
    )
    return folder, done


def test_dry_run_writes_nothing(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["to-hf", str(run), str(tmp_path / "out"), "--dry-run"]) == 0
    assert "qwen3" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", ["0", "five", "-1GB", "1TB", "9" * 40])
def test_sizes_of_shards(
    tmp_path: Path, run: Path, size: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error = error_of(capsys, "to-hf", run, tmp_path / "out", f"--max-shard-size={size}")
    assert "500MB or 5GB" in error


def test_the_destination_must_be_new(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    assert "exists" in error_of(capsys, "to-hf", run, tmp_path / "out")


def test_a_folder_with_the_temporary_name_is_not_deleted(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / "thesis.tex").touch()
    assert "thesis.tex" in error_of(capsys, "to-hf", run, tmp_path / "out")
    assert (tmp_path / "out.tmp" / "thesis.tex").exists()


def test_another_corpus_is_refused(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_corpus(tmp_path / "other").directory
    text = (other / "corpus.toml").read_text().replace('"<de>" = 8', '"<fr>" = 8')
    (other / "corpus.toml").write_text(text)
    error = error_of(capsys, "to-hf", run, tmp_path / "out", "--corpus", other)
    assert "--corpus" in error


def test_full_disk(
    tmp_path: Path,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(safetensors_files.os, "fsync", full)
    assert "No space left" in error_of(capsys, "to-hf", run, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_kill_leaves_no_export(
    run: Path, process: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    folder, done = process
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list(folder.glob("killed*")) == [folder / "killed.tmp"]
    assert main(["to-hf", str(run), str(folder / "killed")]) == 0
    assert list(folder.glob("killed*")) == [folder / "killed"]


def test_dtype(tmp_path: Path, run: Path) -> None:
    assert main(["to-hf", str(run), str(tmp_path / "out"), "--dtype", "bf16", "--verify"]) == 0
    exported = load_file(tmp_path / "out" / "model.safetensors")
    weights = CheckpointSource(run)
    norm = weights.read(f"{WEIGHT_PREFIX}final_norm.towers.0.weight")
    assert torch.equal(exported["model.norm.weight"], norm.to(torch.bfloat16))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_contradicting_configuration_is_refused(
    tmp_path: Path, run: Path, corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["to-hf", str(run), str(tmp_path / "out")]) == 0
    config = tmp_path / "run.toml"
    config.write_text(RUN)
    common = ["from-hf", tmp_path / "out", "--config", config]
    common += ["--set", f'data.corpus="{corpus.directory}"']
    common += ["--set", f'run.directory="{tmp_path}/runs"']
    error = error_of(capsys, *common, "--set", "model.num_layers=3")
    assert "model.num_layers = 3, but the source has 2" in error
    error = error_of(capsys, *common, "--map", "text=other")
    assert "--map names tower 'other'" in error
    assert main([str(argument) for argument in [*common, "--dry-run"]]) == 0
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_peak_memory(process: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    """Both directions stream: memory is that of a few tensors, not of the model."""
    growth = json.loads((process[0] / GROWTH_FILE).read_text())
    allowed = 3 * growth["largest"] + 48 * MEGABYTE
    assert growth["total"] > 2 * allowed
    assert growth["export"] < allowed
    assert growth["import"] < allowed
