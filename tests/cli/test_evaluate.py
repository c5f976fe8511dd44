"""What the command refuses; mot_megatron.train.label_kinds tests the losses themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

from mot_megatron.cli.evaluate import main


@pytest.mark.parametrize("number", ["0", "-3"])
def test_number_of_sequences_that_measures_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], number: str
) -> None:
    assert main(["--checkpoint", str(tmp_path), f"--sequences={number}"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == f"error: --sequences {number}: needed: 1 or more\n"
