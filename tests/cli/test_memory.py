"""Tests of measured memory of towers on two ranks, compared with the dense model."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from mot_megatron.cli.memory import main, text, worlds_of
from mot_megatron.config_files import load_config
from mot_megatron.planning.activations import Rows
from mot_megatron.planning.memory import RankMemory, StateBytes
from mot_megatron.rules import check
from tests.cli.console import only_error
from tests.columns import widest
from tests.small_runs import CONFIG, write_corpus

# A model with most weights in its layers, not in its vocabulary: 3.8 of 4.3 M elements.
MEDIUM = [
    "model.num_layers=4",
    "model.hidden_size=256",
    "model.ffn_hidden_size=704",
    "model.vocab_size=1024",
    "model.modalities.speech.tower=image",
]
MP2 = "parallel.modality_parallel_size=2"


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    corpus = write_corpus(folder / "corpus")
    path = folder / "small.toml"
    path.write_text(CONFIG.format(corpus=corpus))
    return path


def arguments(config_file: Path, ranks: int, *overrides: str) -> list[str]:
    settings = [part for override in overrides for part in ("--set", override)]
    return ["--config", str(config_file), "--world-size", str(ranks), *settings]


def test_a_tower_per_rank_needs_the_memory_of_the_dense_model(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments(config_file, 2, MP2, *MEDIUM), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [rank["towers"] for rank in report["ranks"]] == [["text"], ["image"]]
    dense = report["dense_same_replicas"]
    assert dense["num_ranks"] == 1
    assert dense["ratio"]["total"] <= 1.1
    # Weights and gradients equal the dense model's exactly. Of the optimizer's 12 bytes per
    # element, only those of the shared vocabulary matrices are split over the two ranks.
    (alone,) = dense["ranks"]
    for rank in report["ranks"]:
        assert rank["weights"] == rank["gradients"] == alone["weights"] == alone["gradients"]
        assert alone["optimizer"] - rank["optimizer"] == 12 * 2 * 1024 * 256 / 2
        assert rank["activations"] > 0
    # On the same number of ranks, ZeRO-1 halves the dense model's optimizer state per rank.
    same = report["dense_same_ranks"]
    assert same["num_ranks"] == 2
    assert all(rank["optimizer"] == alone["optimizer"] / 2 for rank in same["ranks"])
    assert 1.1 < same["ratio"]["total"] < 1.5


def test_table(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = "parallel.pipeline_model_parallel_size=2"
    assert main(arguments(config_file, 2, stages)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert widest(lines) <= 120
    assert lines[0] == "small, 3 towers on 2 ranks: bytes per rank"
    first, second = lines[2].split(), lines[3].split()
    assert first[:2] == ["0", "0"]
    assert second[:2] == ["1", "1"]
    assert first[2] == first[3]  # fp32 weights and gradients
    assert first[-3:] == ["text,", "image,", "speech"]
    assert lines[-2] == "fullest rank / dense twin on 2 ranks (as many ranks):"
    assert " of the model state (weights " in lines[-1]


def test_titles_distinguish_the_dense_twins(config_file: Path) -> None:
    worlds = worlds_of(load_config(config_file, [MP2]), 4)
    rank = RankMemory(0, ("text",), StateBytes(100, 100, 300), 10, Rows((1,), 1))
    lines = text(worlds, {name: [rank] for name in worlds}).splitlines()
    assert [line for line in lines if line.startswith("fullest rank / ")] == [
        "fullest rank / dense twin on 2 ranks"
        " (as many model replicas: ranks / modality-parallel size):",
        "fullest rank / dense twin on 4 ranks (as many ranks):",
    ]
    assert widest(lines) <= 120


def test_the_twin_of_experts_is_plain(config_file: Path) -> None:
    overrides = ["model.towers.text.experts={num_moe_experts=4}",
                 "parallel.expert_model_parallel_size=2"]  # fmt: skip
    twin = worlds_of(load_config(config_file, overrides), 2)["dense_same_ranks"].config
    check(twin, "twin")
    assert not twin.model.has_experts


def test_two_micro_batches_are_run_if_a_step_has_one(config_file: Path) -> None:
    config = load_config(config_file, [])
    assert config.accumulation_steps(8) == 1
    for world in worlds_of(config, 8).values():
        assert world.config.accumulation_steps(8) == 2


@pytest.mark.parametrize(
    ("ranks", "overrides", "message"),
    [
        (3, [MP2], "error: the world size 3 is not divisible by"),
        (0, [], "error: --world-size 0: must be at least 1"),
        (1, ["data.corpus=nowhere"], "error: nowhere/corpus.toml"),
    ],
)
def test_bad_input_is_one_line(
    config_file: Path,
    capsys: pytest.CaptureFixture[str],
    ranks: int,
    overrides: list[str],
    message: str,
) -> None:
    assert main(arguments(config_file, ranks, *overrides)) == 2
    assert only_error(capsys.readouterr().err).startswith(message)


def test_ranks_that_take_too_long_are_stopped(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments(config_file, 1), "--timeout", "0.1"]) == 2
    error = only_error(capsys.readouterr().err)
    assert error == "error: the ranks were still running after 0.1 s"


@pytest.mark.slow
def test_ranks_end_when_the_command_is_killed(config_file: Path) -> None:
    many = "training.global_batch_size=100000"  # so that the ranks run for a long time
    command = [sys.executable, "-m", "mot_megatron", "memory", *arguments(config_file, 2, many)]
    tool = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    started: list[psutil.Process] = []

    def all_run() -> bool:
        started[:] = psutil.Process(tool.pid).children(recursive=True)
        return len(started) == 4  # two helpers of multiprocessing and two ranks

    try:
        wait_until(all_run, seconds=60)
    finally:
        tool.kill()
        tool.wait()
    wait_until(lambda: not any(map(is_alive, started)), seconds=20)


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
