"""Tests that the shipped configuration files are found, listed and copied."""

from __future__ import annotations

from pathlib import Path

import pytest

from mot_megatron.cli.configs import first_sentence, main
from mot_megatron.config_files import load_config
from tests.cli.console import only_error
from tests.launch.entry_points import ROOT

CONFIGS = ROOT / "configs"


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    where, *lines = capsys.readouterr().out.splitlines()
    assert where == f"in {CONFIGS}:"
    names = {str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.toml")}
    assert {line.split()[0] for line in lines} == names
    assert all(len(line.split()) > 3 for line in lines)


def test_first_sentence(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('# Trains in 1.5 minutes, on\n# two cores. And more.\n[run]\nname = "a"\n')
    assert first_sentence(path) == "Trains in 1.5 minutes, on two cores"
    path.write_text("# No more.\n\n# Not this\n")
    assert first_sentence(path) == "No more"


def test_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "mine"
    assert main(["--copy", str(target)]) == 0
    assert capsys.readouterr().out == (
        f"{target}: {len(list(CONFIGS.rglob('*.toml')))} configuration files\n"
    )
    assert load_config(target / "quickstart.toml").run.name == "quickstart"
    assert (target / "paper" / "README.md").is_file()
    # Files that a user may have changed are not overwritten.
    assert main(["--copy", str(target)]) == 2
    assert "the folder is not empty" in only_error(capsys.readouterr().err)
    assert main(["--copy", "/dev/null/configs"]) == 2
    assert "/dev/null/configs: cannot be written" in only_error(capsys.readouterr().err)
