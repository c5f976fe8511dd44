"""Tests of the lock of a run's folder: a job that lost it changes nothing there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tqdm import tqdm

from mot_megatron.checkpoint import find_checkpoint, save_checkpoint
from mot_megatron.checkpoint.save import Background
from mot_megatron.errors import CheckpointError
from mot_megatron.run.lock import RunLock
from tests.checkpoint.states import list_files, state


def _take_over(lock: RunLock) -> None:
    """Do what another job does to the lock of one that it believes to have ended."""
    content = json.loads(lock.path.read_bytes())
    content["token"] = "another"
    content["owner"]["host"] = "elsewhere"
    lock.path.write_text(json.dumps(content))


def _save(directory: Path, step: int, lock: RunLock) -> None:
    save_checkpoint(
        directory,
        step,
        state(step),
        metadata={},
        config_text="",
        groups=None,
        keep=1,
        background=Background(None, tqdm(disable=True), lock.confirm),
    )


@pytest.fixture
def lock(tmp_path: Path) -> RunLock:
    taken = RunLock(tmp_path / "run")
    taken.acquire(print)
    return taken


def test_an_owner_saves(lock: RunLock, tmp_path: Path) -> None:
    _save(tmp_path / "checkpoints", 1, lock)
    lock.path.unlink()  # by a person: nobody has taken the folder over
    _save(tmp_path / "checkpoints", 2, lock)
    newest = find_checkpoint(tmp_path / "checkpoints").checkpoint
    assert newest is not None
    assert newest.step == 2


def test_a_job_that_lost_the_folder_does_not_begin_a_save(lock: RunLock, tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    _save(checkpoints, 1, lock)
    (checkpoints / "step_00000002.tmp").mkdir()  # a save of the other job
    before = list_files(checkpoints)
    _take_over(lock)
    with pytest.raises(CheckpointError, match=r"another job .*elsewhere.* took over this folder"):
        _save(checkpoints, 2, lock)
    assert list_files(checkpoints) == before
    lock.release()
    assert lock.path.exists()


def test_a_save_that_was_overtaken_is_not_completed(
    lock: RunLock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job is suspended while it writes, and goes on after another job took the folder over."""
    checkpoints = tmp_path / "checkpoints"
    _save(checkpoints, 1, lock)

    def overtaken(*_: object) -> None:
        _take_over(lock)

    monkeypatch.setattr("mot_megatron.checkpoint.save.check_written", overtaken)
    with pytest.raises(CheckpointError, match="took over this folder"):
        _save(checkpoints, 2, lock)
    newest = find_checkpoint(checkpoints).checkpoint
    assert newest is not None
    assert newest.step == 1
    # The unfinished folder may be that of the other job by now.
    assert (checkpoints / "step_00000002.tmp").exists()
