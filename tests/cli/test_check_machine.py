"""``mot check-machine``: its arguments, and a small check of this machine on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mot_megatron.cli.check_machine import main
from mot_megatron.machine_check import parity, run
from tests.cli.console import only_error


def test_the_checks_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "--quick"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "probes/zero rows: at most 40 s, 1 device" in lines
    assert not any(line.startswith("branches/") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "moon"], "--only moon: no check has these words; see --list"),
        ([], "--output: required, the folder of the report"),
    ],
)
def test_bad_arguments_are_one_line_errors(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err.removeprefix("mot check-machine: looking for devices\n")
    assert words in only_error(error)


@pytest.mark.slow
def test_a_small_check_of_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["machine/software", "TP 2, sequence parallel", "DP 8, ZeRO-3"]
    arguments = [word for name in names for word in ("--only", name)]
    arguments += ["--devices", "2", "--output", str(tmp_path / "check"), "--json"]
    assert main(arguments) == 0
    document = json.loads(capsys.readouterr().out)
    found = {name: check["status"] for name, check in document["checks"].items()}
    assert found == {
        "machine/software": "PASS",
        "layouts/TP 2, sequence parallel": "PASS",
        "layouts/DP 8, ZeRO-3": "SKIPPED",
    }
    report = (tmp_path / "check" / "check.md").read_text()
    assert "Nothing here was run on a GPU" in report
    assert "| TP 2, sequence parallel | PASS | 5 steps in fp32" in report


def test_the_reference_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "record_reference", lambda context: {"on": context.device})
    path = tmp_path / "reference.json"
    assert main(["--record", str(path), "--output", str(tmp_path / "check")]) == 0
    assert json.loads(path.read_text()) == {"on": "cpu"}


def test_an_interrupted_check_says_how_to_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run_isolated", interrupted)
    assert main(["--quick", "--output", str(tmp_path / "check")]) == 130
    assert capsys.readouterr().err.endswith("interrupted; the same command continues\n")
