"""Measurements of scaling: their records, figures and reports, and how they are continued."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mot_megatron.errors import ConfigError, DataError
from mot_megatron.planning.arms import MODEL, TWIN
from mot_megatron.run.step_clock import CAUSES, COMPUTE, GRADIENTS
from mot_megatron.scaling import measure as measure_module
from mot_megatron.scaling.conclusions import ratios_of, regressions, times_page, times_to_loss
from mot_megatron.scaling.measure import (
    Point,
    Setting,
    measure,
    prepare,
    read_records,
)
from mot_megatron.scaling.report import document, page, plot, rows_of
from mot_megatron.scaling.split import PADDING, splits_of
from tests.model.small_models import small_config

CONFIG = small_config({"text": "text"})


def setting_in(directory: Path, *sizes: int, repeats: int = 2) -> Setting:
    configs = dict.fromkeys(sizes, CONFIG)
    return Setting(
        {MODEL: configs, TWIN: configs},
        warmup=1,
        steps=2,
        repeats=repeats,
        weak=True,
        directory=directory,
        environment={},
        job_seconds=1,
    )


def record(world_size: int, seconds: list[float], tokens: int) -> dict[str, Any]:
    """A job of two steps after one of warm-up."""
    return {
        "world_size": world_size,
        "step_seconds": [9.0, *seconds],
        "part_seconds": {
            "data": [9.0, 0.1, 0.1],
            "forward and backward": [9.0, 0.6, 0.6],
            "optimizer": [9.0, 0.2, 0.2],
        },
        "tokens": {"text": [7, tokens, tokens], "image": [7, tokens, tokens]},
        "flops": [1, 40, 40],
        "imbalance": [1.0, 1.25, 1.25],
        "peak_flops_per_second": 100 * world_size,
        "peak_memory_bytes": 10**9,
        "positions": 2 * tokens + 5,
        "devices": ["abacus"],
        "versions": {"torch": "1"},
    }


DESCRIPTION = {"weak": True, "warmup": 1, "steps": 2}
RECORDS = {
    Point(MODEL, 1, 0): record(1, [1.0, 1.0], 50),
    Point(MODEL, 1, 1): record(1, [1.25, 1.25], 50),
    Point(TWIN, 1, 0): record(1, [0.5, 0.5], 50),
    Point(MODEL, 4, 0): record(4, [1.25, 1.25], 200),
    Point(TWIN, 4, 0): {"error": "out of memory"},
}


def test_padding_is_the_mean_share_of_empty_positions() -> None:
    """The modalities vary against each other: the sum of their medians is not the usual sum."""
    of_ranks = {cause: [0.0] for cause in CAUSES} | {COMPUTE: [8.0], GRADIENTS: [2.0]}
    job = {
        "world_size": 1,
        "parallel": CONFIG.parallel.model_dump(mode="json"),
        "positions": 100,
        "tokens": {"text": [80, 80, 0, 80], "image": [20, 20, 60, 20]},
        "split": of_ranks,
    }
    (split,) = splits_of(job).values()
    assert split[PADDING] == pytest.approx(0.8 * 0.1)
    assert (split[COMPUTE], split[GRADIENTS]) == pytest.approx((0.72, 0.2))


def test_figures_of_fixed_numbers() -> None:
    one, four, twin = rows_of(DESCRIPTION, RECORDS)
    assert (one.arm, one.world_size, one.repeats) == (MODEL, 1, 2)
    rates = one.tokens_per_gpu_second
    assert (rates.low, rates.median, rates.high) == (80, 90, 100)
    assert one.efficiency == twin.efficiency == 1
    # 400 tokens in 1.25 s on four ranks, over the median of 90 on one.
    assert four.tokens_per_gpu_second.median == 80
    assert four.efficiency == pytest.approx(80 / 90)
    assert one.utilization == pytest.approx(40 / 1.125 / 100)
    assert one.parts == pytest.approx(
        {"data": 0.1 / 1.125, "forward and backward": 0.6 / 1.125, "optimizer": 0.2 / 1.125}
    )
    assert one.ratio is not None
    assert one.ratio.median == 2
    assert four.ratio is None
    assert four.imbalance == 1.25


def test_strong_scaling_halves_the_step_at_full_efficiency() -> None:
    records = {
        Point(MODEL, 1, 0): record(1, [1.0, 1.0], 50),
        Point(MODEL, 2, 0): record(2, [0.5, 0.5], 50),
    }
    rows = rows_of({**DESCRIPTION, "weak": False}, records)
    assert [row.efficiency for row in rows] == [1, 1]


def test_report_has_all_figures_and_failures(tmp_path: Path) -> None:
    rows = rows_of(DESCRIPTION, RECORDS)
    text = page(DESCRIPTION, rows, RECORDS)
    assert "weak scaling" in text
    assert "| model | 1 | 2 | 1.125 (1.000 to 1.250) | 90 (80 to 100) | 100.0%" in text
    assert "- dense-twin-4-0: out of memory" in text
    figures = document(DESCRIPTION, rows, RECORDS)
    assert figures["stamp"] == "MEASURED"
    assert figures["failed"] == {"dense-twin-4-0": "out of memory"}
    plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_time_to_the_dense_loss_is_step_ratio_times_slope(tmp_path: Path) -> None:
    path = tmp_path / "slopes.json"
    match = {"arm": "mot", "modality": "text", "split": "held_out", "axis": "steps", "slope": 0.5}
    other = {**match, "axis": "flops", "slope": 0.9, "interval": None}
    path.write_text(json.dumps([{**match, "interval": [0.4, 0.6]}, other]))
    records = {**RECORDS, Point(TWIN, 1, 1): record(1, [1.0, 1.0], 50)}
    rows = rows_of(DESCRIPTION, records)
    (found,) = times_to_loss(ratios_of(rows), path, "mot")
    # Step ratios of the two repeats: 2 and 1.25.
    assert (found.world_size, found.ratio) == (1, 0.5 * 1.625)
    assert (found.low, found.high) == (0.4 * 1.25, 0.6 * 2)
    assert "| text | held out | 1 | 0.500 | 0.812 (0.500 to 1.200) |" in times_page(
        [found], path, "mot", "MEASURED"
    )
    with pytest.raises(DataError, match="no slope of arm 'moe'; arms: mot"):
        times_to_loss(ratios_of(rows), path, "moe")
    with pytest.raises(DataError, match="run the command with --arms dense"):
        times_to_loss({}, path, "mot")
    path.write_text("{}")
    with pytest.raises(DataError, match="no slope of arm"):
        times_to_loss(ratios_of(rows), path, "mot")
    path.write_text("[1]")
    with pytest.raises(DataError, match=r"not the slopes\.json of a comparison"):
        times_to_loss(ratios_of(rows), path, "mot")


def test_regressions_beyond_the_spread_are_named() -> None:
    before = {Point(MODEL, 1, n): record(1, [s, s], 50) for n, s in enumerate((1.0, 1.1))}
    within = {Point(MODEL, 1, n): record(1, [s, s], 50) for n, s in enumerate((1.05, 1.3))}
    beyond = {Point(MODEL, 1, n): record(1, [s, s], 50) for n, s in enumerate((1.2, 1.3))}
    old, near, new = (rows_of(DESCRIPTION, records) for records in (before, within, beyond))
    assert regressions(old, near) == regressions(new, old) == []
    (line,) = regressions(old, new)
    assert line.startswith("model, 1 rank: 95 (91 to 100) tokens/s per rank before, 80 (77 to 83)")
    with pytest.raises(DataError, match="no arm and number of ranks in common"):
        regressions(old, [replace(new[0], world_size=8)])


def test_nothing_to_report() -> None:
    with pytest.raises(DataError, match="no job of this measurement has ended well"):
        rows_of(DESCRIPTION, {Point(MODEL, 1, 0): {"error": "x"}})


def test_arms_and_sizes_alternate(tmp_path: Path) -> None:
    points = setting_in(tmp_path, 1, 2).points()
    assert [point.name for point in points[:5]] == [
        "model-1-0",
        "dense-twin-1-0",
        "model-2-0",
        "dense-twin-2-0",
        "model-1-1",
    ]
    assert len(points) == len(set(points)) == 8


def test_a_measurement_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = setting_in(tmp_path / "m", 1, 2)
    started: list[str] = []

    def run(_: Setting, point: Point, path: Path) -> str | None:
        started.append(point.name)
        if len(started) == 3:
            raise KeyboardInterrupt
        path.write_text(json.dumps(record(point.world_size, [1.0, 1.0], 50)))
        return "broken" if point.name == "dense-twin-1-0" else None

    monkeypatch.setattr(measure_module, "_run", run)
    prepare(setting)
    with pytest.raises(KeyboardInterrupt):
        list(measure(setting, lambda _: None))
    description, records = read_records(setting.directory)
    assert [row.world_size for row in rows_of(description, records)] == [1]
    assert records[Point(TWIN, 1, 0)] == {"error": "broken"}
    # The same command does what is missing and what failed, and may add numbers of ranks.
    larger = setting_in(tmp_path / "m", 1, 2, 4)
    prepare(larger)
    list(measure(larger, lambda _: None))
    assert started.count("model-1-0") == 1
    assert started.count("model-2-0") == started.count("dense-twin-1-0") == 2
    assert started.count("model-4-1") == 1
    assert len(read_records(setting.directory)[1]) == 12


def test_another_measurement_or_folder_is_refused(tmp_path: Path) -> None:
    setting = setting_in(tmp_path / "m", 1)
    prepare(setting)
    prepare(setting)
    for other in (replace(setting, steps=3), replace(setting, weak=False)):
        with pytest.raises(ConfigError, match="another measurement"):
            prepare(other)
    changed = small_config({"text": "text"}, "training.micro_batch_size=3")
    with pytest.raises(ConfigError, match="another measurement"):
        prepare(replace(setting, configs={MODEL: {1: changed}}))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(DataError, match="not empty, and holds no measurement"):
        prepare(replace(setting, directory=tmp_path / "full"))
    (setting.directory / "measurement.json").write_text("[]")
    with pytest.raises(DataError, match="not written by mot benchmark scaling measure"):
        prepare(setting)
    with pytest.raises(DataError, match="not written by mot benchmark scaling measure"):
        read_records(setting.directory)
    with pytest.raises(DataError, match="not the folder of a measurement"):
        read_records(tmp_path / "nothing")
