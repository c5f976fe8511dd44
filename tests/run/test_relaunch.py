"""When a failed job is started again, and what supervisors on other nodes read of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mot_megatron.run.outcome import StepFile, forget_outcome, read_step
from mot_megatron.run.relaunch import (
    Decision,
    Failure,
    Record,
    RestartPolicy,
    newest_checkpoint,
)


class Clock:
    """A clock that a test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_restarts_within_the_window_are_limited() -> None:
    clock = Clock()
    policy = RestartPolicy(2, 60.0, clock)
    assert policy.object_to(Failure(1, None)) is None
    clock.now += 30
    assert policy.object_to(Failure(2, None)) is None
    assert policy.used == 2
    assert "started again 2 times within 1 minutes" in str(policy.object_to(Failure(3, None)))
    clock.now += 31
    assert policy.object_to(Failure(3, None)) is None
    assert policy.used == 2


@pytest.mark.parametrize("step", [None, 0, 17])
def test_the_same_step_is_not_lost_twice(step: int | None) -> None:
    policy = RestartPolicy(100, 60.0)
    assert policy.object_to(Failure(step, 10)) is None
    assert policy.object_to(Failure(18, 10)) is None  # another step
    assert policy.object_to(Failure(step, 16)) is None  # another checkpoint
    assert "it failed there before" in str(policy.object_to(Failure(step, 10)))


def test_followers_read_every_decision_once(tmp_path: Path) -> None:
    record = Record(tmp_path / "new" / "run")
    assert len(record) == 0
    assert record.after(0) is None
    decisions = [Decision(True, 3, "again"), Decision(False, 0, "done")]
    for decision in decisions:
        record.add(decision)
    assert [record.after(0), record.after(1), record.after(2)] == [*decisions, None]


def test_only_complete_checkpoints_count(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    for name in ("step_00000007", "step_00000012", "step_00000014.tmp", "other"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert newest_checkpoint(tmp_path) == 12


def test_the_step_survives_its_writer(tmp_path: Path) -> None:
    file = StepFile(tmp_path)
    assert read_step(tmp_path) is None
    for step in (9, 10, 3):
        file.record(step)
        assert read_step(tmp_path) == step
    file.close()
    forget_outcome(tmp_path)
    assert read_step(tmp_path) is None
    StepFile(tmp_path / "absent").record(1)  # errors are ignored
    StepFile(None).record(1)
