"""Profiles of machines, published runs, and the constants fitted to them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mot_megatron.errors import ConfigError
from mot_megatron.scaling.accuracy import (
    Errors,
    fit,
    fitted_text,
    load_fitted,
    measure_accuracy,
    report,
    summarize,
)
from mot_megatron.scaling.costs import RANGES, Constants, as_vector
from mot_megatron.scaling.machine import Line, load_machine
from mot_megatron.scaling.published import Run, paper_run, read_runs, step_seconds

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PROFILES = sorted((CONFIGS / "machines").glob("*.toml"))
RUNS = read_runs(CONFIGS / "scaling" / "published_runs.csv")
MACHINES = {path.stem: load_machine(path) for path in PROFILES}


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_shipped_profiles_are_complete(path: Path) -> None:
    machine = load_machine(path)
    assert machine.stamps == ("DATA SHEET",)
    assert machine.devices_per_node == 8


def test_published_runs_are_read() -> None:
    assert len(RUNS) == 181
    one = RUNS[0]
    assert (one.model, one.gpus, one.data, one.micro_batches, one.recompute) == (
        "mpt-70b",
        64,
        64,
        4,
        "full",
    )
    assert {run.machine for run in RUNS} <= set(MACHINES)


def synthetic_runs(constants: Constants) -> list[Run]:
    """Runs of two sources that follow the cost model exactly."""
    chosen = [run for run in RUNS if run.pipeline == 1 and not run.fp8][::3]
    return [
        replace(
            run,
            source="A page" if run.hidden % 1024 else "B page",
            step_seconds=step_seconds(run, MACHINES[run.machine], constants),
        )
        for run in chosen
    ]


def test_a_fit_finds_the_constants_of_synthetic_runs() -> None:
    true = Constants(0.6, 0.4, 0.7, 0.5, latency_us=30, overlap=0.7)
    runs = synthetic_runs(true)
    found = fit(runs, MACHINES)
    for run in runs:
        forecast = step_seconds(run, MACHINES[run.machine], found)
        assert forecast == pytest.approx(run.step_seconds, rel=0.02)
    assert found.matrix_efficiency == pytest.approx(0.6, rel=0.05)
    for value, (low, high) in zip(as_vector(found), RANGES.values(), strict=True):
        assert low <= value <= high


def test_accuracy_of_runs_that_follow_the_model(tmp_path: Path) -> None:
    runs = synthetic_runs(Constants())
    accuracies = measure_accuracy(runs, MACHINES)
    fitted = summarize(accuracies, fit(runs, MACHINES))
    assert fitted.cold.median < 0.02
    assert fitted.cold.count == len(runs)
    text = report(accuracies, fitted, MACHINES)
    assert "| **all** |" in text
    assert "| 7B | 256 |" in text
    path = tmp_path / "constants.toml"
    path.write_text(fitted_text(fitted))
    assert load_fitted(path) == fitted


def test_the_shipped_constants_meet_the_stated_errors() -> None:
    fitted = load_fitted(CONFIGS / "scaling" / "constants.toml")
    errors = [
        step_seconds(run, MACHINES[run.machine], fitted.constants) / run.step_seconds - 1
        for run in RUNS
    ]
    # Fitted to all of them, so below the error of the families left out.
    assert Errors.of(errors).median < fitted.cold.median
    assert fitted.cold.median <= 0.10
    assert fitted.anchored.median <= 0.04


def test_untied_towers_cost_traffic_and_not_products() -> None:
    fast = replace(MACHINES["a100-80gb-efa"], network_gb_per_s=1e6, link_gb_per_s=1e6)
    slow = MACHINES["a100-80gb-efa"]
    constants = replace(Constants(), latency_us=0.0)
    dense, mot = paper_run("7B", 256), paper_run("7B", 256, towers=2)
    ratios = [
        step_seconds(mot, machine, constants) / step_seconds(dense, machine, constants)
        for machine in (fast, slow)
    ]
    # Sorting tokens and the optimizer's states remain.
    assert 1 < ratios[0] < 1.15 < ratios[1] < 2


PROFILE = PROFILES[0].read_text()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('name = "8 x A100', 'title = "8 x A100', "name: expected the machine's name"),
        (
            "matrix_tflops = {",
            "matrices = {",
            "device.matrix_tflops: absent, but forecasts need it",
        ),
        (
            "{ value = 312,",
            "{ value = -1,",
            "device.matrix_tflops.value: expected a number above 0",
        ),
        ("{ value = 312,", "{ value = true,", "expected a number above 0, found True"),
        ('stamp = "DATA SHEET"', 'stamp = "GUESS"', "stamp: expected one of DATA SHEET, MEASURED"),
        ("{ value = 312, stamp", "{ number = 312, stamp", "device.matrix_tflops: expected {"),
        ("[node]", "[nodes]", "node.devices: absent"),
        ("[node]", "[other]\nkey = 1\n[node]", "other.key: unknown key"),
        ("[node]", "[node", "Expected ']'"),
    ],
)
def test_faults_of_a_profile_are_one_line(tmp_path: Path, old: str, new: str, words: str) -> None:
    assert old in PROFILE
    path = tmp_path / "mine.toml"
    path.write_text(PROFILE.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        load_machine(path)
    assert words in str(caught.value)
    assert str(caught.value).startswith(str(path))


GROUP = """
[[groups]]
axes = "node"
size = 8
per_node = 8
stamp = "MEASURED"
source = "calibrated"
latency_us = { all-gather = 5 }
gb_per_s = { all-gather = 100 }
"""


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("size = 8", "sizes = 8", "groups: expected the keys axes, gb_per_s, latency_us, per_node"),
        ("size = 8", "size = 0", "groups.size: expected a number above 0, found 0"),
        ("MEASURED", "DATA SHEET", "groups.stamp: expected MEASURED"),
        ("{ all-gather = 5 }", "{ reduce = 5 }", "expected tables with the same keys"),
        ("{ all-gather = 5 }", "5", "expected tables with the same keys"),
        ("100 }", "'much' }", "groups.gb_per_s.all-gather: expected a number above 0"),
        ("[[groups]]", "[groups]", "groups: expected tables [[groups]]"),
    ],
)
def test_faults_of_measured_groups_are_one_line(
    tmp_path: Path, old: str, new: str, words: str
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(PROFILE + GROUP)
    (group,) = load_machine(path).groups
    assert group.lines["all-gather"] == Line(5e-6, 100e9)
    path.write_text(PROFILE + GROUP.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        load_machine(path)
    assert words in str(caught.value)
    assert str(caught.value).startswith(str(path))


def test_an_unknown_machine_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"No such file .*; profiles in .*a100-80gb-efa"):
        load_machine(CONFIGS / "machines" / "a1.toml")


def test_constants_of_another_kind_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "constants.toml"
    path.write_text("[constants]\nspeed = 1\n")
    with pytest.raises(ConfigError, match="not written by mot benchmark scaling accuracy"):
        load_fitted(path)
