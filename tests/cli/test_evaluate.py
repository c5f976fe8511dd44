"""Tests of invalid arguments; the losses are tested with mot_megatron.train.label_kinds."""

from __future__ import annotations

from pathlib import Path

import pytest

from mot_megatron.cli.evaluate import main


@pytest.mark.parametrize("number", ["0", "-3"])
def test_number_of_sequences_below_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], number: str
) -> None:
    assert main(["--checkpoint", str(tmp_path), f"--sequences={number}"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == f"error: --sequences {number}: must be at least 1\n"
