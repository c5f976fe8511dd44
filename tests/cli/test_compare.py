"""Tests of a whole comparison with real training, from configurations to a report."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from mot_megatron.cli.compare import main
from mot_megatron.compare.runs import sole_user, steps_done
from tests.cli.console import only_error
from tests.compare.small_comparison import plan, save_ended_run, write_configs
from tests.compare.small_comparison import write_description as write_corpus_toml
from tests.compare.synthetic_runs import losses
from tests.launch.entry_points import EntryPoint, Finished, run_entry_point, wait_until
from tests.small_runs import write_corpus

pytestmark = pytest.mark.slow

SCRIPT = "tools/compare.py"
STEPS = 120


def arguments(folder: Path, *more: str) -> list[str]:
    fast = ("training.micro_batch_size=8", "evaluation.interval_steps=20", "data.packing=sequence")
    settings = [part for setting in fast for part in ("--set", setting)]
    return [str(folder / "configs"), "--output", str(folder / "out"), *settings, *more]


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(words) == 2
    return only_error(capsys.readouterr().err)


def assert_status(finished: Finished, status: int) -> None:
    assert finished.status == status, finished.output + finished.errors


def test_stopped_comparison_continues_and_reports(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    write_configs(tmp_path / "configs", corpus, STEPS)
    command = arguments(tmp_path, "--arms", "dense", "mot", "--seeds", "1")
    output = tmp_path / "out"
    logs = [output / "logs" / f"{arm}-s1.log" for arm in ("dense", "mot")]
    with EntryPoint(tmp_path / "first", SCRIPT, *command) as running:
        wait_until(lambda: any(map(steps_done, logs)), "the first steps of a run", timeout=300)
        os.kill(running.pid, signal.SIGTERM)
        stopped = running.wait()
    assert_status(stopped, 1)
    assert stopped.output.splitlines()[-1].startswith("stopped; run the same command to continue: ")
    assert not (output / "records").exists()
    assert max(map(steps_done, logs)) < STEPS

    assert_status(run_entry_point(tmp_path / "second", SCRIPT, *command), 0)
    consoles = [log.read_text() for log in logs]
    assert [text.count("$ ") for text in consoles] == [2, 2]  # two starts in one console
    # The other run may not have finished its first step; then it starts over.
    saved = [text for text in consoles if "asked to stop: saved" in text]
    assert saved
    assert all("continuing from" in text for text in saved)
    report = (output / "report.md").read_text()
    assert "- text: " in report
    assert len(json.loads((output / "slopes.json").read_text())) == 2 * 3 * 3

    # All runs have finished: nothing is trained again, and the report is the same without them.
    (output / "runs").rename(tmp_path / "gone")
    assert main([*command, "--report-only"]) == 0
    assert (output / "report.md").read_text() == report


@pytest.mark.parametrize("enough", [True, False])
def test_finished_runs_are_reported_if_another_fails(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    enough: bool,
) -> None:
    runs = plan(tmp_path, seeds=[1])
    for run in runs[: 2 if enough else 1]:  # dense, pair; mot remains
        save_ended_run(run, tmp_path / "out", {"text": losses(1.0)}, causal=run.arm == "pair")
    monkeypatch.setattr("mot_megatron.compare.report.draw_all", lambda *_: {})
    trainer = tmp_path / "trainer.py"
    trainer.write_text("import sys\nsys.exit('error: the loss of text is not finite')\n")
    monkeypatch.setattr("mot_megatron.cli.compare.TRAINER", (str(trainer),))
    configs, output = str(tmp_path / "configs"), str(tmp_path / "out")
    assert main([configs, "--output", output, "--seeds", "1"]) == 2
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1].startswith("error: ")
    assert "error: the loss of text is not finite" in printed.err.splitlines()[-1]
    assert printed.err.splitlines()[-1].endswith(" more)") != enough
    assert (tmp_path / "out" / "report.md").exists() == enough
    assert ("no report: " in printed.out) != enough


def test_report_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for run in plan(tmp_path, seeds=[1])[:2]:
        save_ended_run(run, tmp_path / "out", {"text": losses(1.0)}, causal=run.arm == "pair")
    monkeypatch.setattr("mot_megatron.compare.report.draw_all", lambda *_: {})
    configs, output = str(tmp_path / "configs"), tmp_path / "out"
    assert main([configs, "--output", str(output), "--report-only", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["matches"] == json.loads((output / "slopes.json").read_text())
    assert str(output / "report.md") in document["written"]


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = str(tmp_path / "nowhere")
    output = str(tmp_path / "out")
    assert "experiment.toml: cannot be read" in refusal(capsys, nowhere, "--output", output)
    configs = str(write_configs(tmp_path / "configs", tmp_path / "corpus"))
    assert "corpus.toml: cannot be read" in refusal(capsys, configs, "--output", output)
    write_corpus_toml(tmp_path / "corpus")
    assert "--arms moth" in refusal(capsys, configs, "--output", output, "--arms", "moth")
    assert "--parallel 0" in refusal(capsys, configs, "--output", output, "--parallel", "0")
    with sole_user(tmp_path / "out"):
        assert "another comparison" in refusal(capsys, configs, "--output", output)
    only = refusal(capsys, configs, "--output", output, "--report-only")
    assert "nothing to compare yet" in only
