"""``mot benchmark step``: its ratios, its jobs, and its one-line errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import mot_megatron
from mot_megatron.cli.benchmark_step import main
from mot_megatron.errors import DataError
from mot_megatron.scaling.measure import Point
from mot_megatron.scaling.versus import OTHER, THIS, step_rows, step_table
from tests.cli.console import only_error
from tests.columns import widest
from tests.small_runs import CONFIG

NAMES = {THIS: "this version", OTHER: "optimizer.lr=0.1"}


def record(*seconds: float, **others: Any) -> dict[str, Any]:
    return {"step_seconds": [9.0, *seconds], "peak_memory_bytes": 10**9, **others}


def test_ratios_are_those_of_neighboring_jobs() -> None:
    """Repeat 1 ran while the machine was slow, so that the ratio of medians would be another."""
    sent = {"sent_bytes": {"gradient reduction": [1e6, 3e6], "expert dispatch": [0, 0]}}
    split = {"split": {"computation": [1.0, 3.0], "data": [0.0, 0.0]}}
    records = {
        Point(THIS, 2, 0): record(1.0, 1.0, 5.0, **sent, **split),
        Point(OTHER, 2, 0): record(2.0, 2.0, 2.0),
        Point(THIS, 2, 1): record(4.0, 4.0, 4.0, **sent, **split),
        Point(OTHER, 2, 1): record(5.0, 5.0, 5.0),
        Point(THIS, 2, 2): record(7.0, 7.0, 7.0, **sent, **split),
        Point(OTHER, 2, 2): {"error": "out of memory"},
    }
    this, other = step_rows(1, records)
    assert (this.arm, other.arm, this.repeats, other.repeats) == (THIS, OTHER, 3, 2)
    assert (this.seconds.low, this.seconds.median, this.seconds.high) == (1, 4, 7)
    assert this.ratio is not None
    assert (this.ratio.low, this.ratio.high) == (0.5, 0.8)
    assert this.ratio.median == pytest.approx(0.65)
    assert other.ratio is None
    assert sum(this.sent_bytes.values()) == 3e6
    assert this.split_seconds == {"computation": pytest.approx(2), "data": 0}
    lines = step_table([this, other], NAMES)
    assert widest(lines) <= 120
    assert "0.650 (0.500 to 0.800)" in lines[1]
    assert lines[2].endswith("?")  # the other version did not count bytes


def test_nothing_but_failed_jobs() -> None:
    with pytest.raises(DataError, match="no job has succeeded"):
        step_rows(1, {Point(THIS, 1, 0): {"error": "out of memory"}})


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    path = tmp_path / "small.toml"
    path.write_text(CONFIG.format(corpus="none"))
    found = ["--config", str(path), "--world-size", "1", "--output", str(tmp_path / "steps")]
    return [*found, "--set", "model.vocab_size=256", "--steps=2", "--warmup=1", "--repeats=1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "corpus.toml: absent; give a corpus, or --synthetic"),
        (["--synthetic", "--against", "."], "/train.py there; give a checkout"),
        (["--synthetic", "--against-set", "training.speed=9"], "training.speed"),
        (
            ["--synthetic", "--against-set", 'model.modalities={text={tower="text"}}'],
            "both versions need the same modalities",
        ),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, *options]) == 2
    assert message in only_error(capsys.readouterr().err)
    assert not (tmp_path / "steps").exists()


def test_a_checkout_whose_extension_is_not_built(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mot_megatron" / "cli").mkdir(parents=True)
    (tmp_path / "mot_megatron" / "cli" / "train.py").touch()
    assert main([*arguments, "--synthetic", "--against", str(tmp_path)]) == 2
    assert "its extension is not built" in only_error(capsys.readouterr().err)


@pytest.mark.slow
def test_another_checkout_runs_its_own_code(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / "checkout" / "mot_megatron"
    shutil.copytree(Path(mot_megatron.__file__).parent, package)
    timing = package / "run" / "timing.py"
    changed = timing.read_text().replace('"peak_memory_bytes":', '"peak_memory_bytes": 7 or')
    assert changed != timing.read_text()
    timing.write_text(changed)
    against = ["--synthetic", "--against", str(tmp_path / "checkout"), "--json"]
    assert main([*arguments, *against]) == 0
    document = json.loads(capsys.readouterr().out)
    this, other = document["rows"]
    assert (this["arm"], other["arm"]) == (THIS, OTHER)
    assert this["memory_bytes"] > other["memory_bytes"] == 7
    assert this["ratio"]["median"] > 0
    assert sum(this["split_seconds"].values()) > 0
    assert json.loads((tmp_path / "steps" / "steps.json").read_text()) == document
