"""Event files on a full disk and with a wrong clock, and dashboards of resumed runs."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.summary.writer import record_writer

from mot_megatron.config_model import BITS_PER_TOKEN
from mot_megatron.run import event_files
from mot_megatron.run.metrics import TensorBoardLog


def points(directory: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(directory), {"scalars": 0}).Reload()
    return [(point.step, point.value) for point in events.Scalars(tag)]


def open_log(
    directory: Path, said: list[str], start_step: int = 1, modality_parallel: bool = False
) -> TensorBoardLog:
    names = ("text",)
    return TensorBoardLog(
        directory,
        dict.fromkeys(names, BITS_PER_TOKEN),
        names,
        start_step,
        modality_parallel,
        say=said.append,
    )


def test_full_disk_loses_points_and_prints_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(event_files, "_REOPEN_SECONDS", 0.0)
    log = open_log(tmp_path, said)
    log.log_scalars({"a": 1.0}, 1)
    log.writer.flush()
    with monkeypatch.context() as full:

        def fail(*_: object) -> None:
            raise OSError(28, "No space left on device")

        full.setattr(record_writer.RecordWriter, "write", fail)
        for step in range(2, 40):
            log.log_scalars({"a": 1.0}, step)
            log.writer.flush()
    for step in range(40, 43):
        log.log_scalars({"a": 1.0}, step)
    log.close()
    assert said[0].endswith("No space left on device; points are lost, and training goes on")
    assert all("writing again" in line or "points are lost" in line for line in said)
    steps = [step for step, _ in points(tmp_path, "a")]
    assert steps[0] == 1
    assert steps[-3:] == [40, 41, 42]


def test_folder_that_cannot_be_created_prints_one_line(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file")
    said: list[str] = []
    log = open_log(tmp_path / "tensorboard", said)
    for step in range(3):
        log.log_scalars({"a": 1.0}, step)
    log.close()
    assert len(said) == 1


def test_points_are_shown_if_the_clock_is_behind_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    for start, clock in ((1, now + 5000), (11, now + 4000), (21, now)):
        monkeypatch.setattr(time, "time", lambda clock=clock: clock)
        log = open_log(tmp_path, [], start)
        for step in range(start, start + 10):
            log.log_scalars({"a": float(start)}, step)
        log.close()
    expected = [(step, float(start)) for start in (1, 11, 21) for step in range(start, start + 10)]
    assert points(tmp_path, "a") == expected


def test_dashboard_keeps_sections_of_earlier_parts_of_the_run(tmp_path: Path) -> None:
    open_log(tmp_path, [], 1, modality_parallel=True).close()
    open_log(tmp_path, [], 5).close()
    events = EventAccumulator(str(tmp_path), {"tensors": 0}).Reload()
    (*_, last) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout()  # type: ignore[attr-defined]
    layout.ParseFromString(last.tensor_proto.string_val[0])
    titles = [category.title for category in layout.category]
    assert titles == ["1 Loss", "2 Optimization", "3 Speed", "4 Modality parallelism"]
