"""Saves in the background: the same bytes as others, one at a time, the same error on all ranks."""

from __future__ import annotations

import resource
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mot_megatron.checkpoint import CheckpointInfo, NamedTensor, find_checkpoint, save_checkpoint
from mot_megatron.checkpoint.background import BackgroundWriter
from mot_megatron.checkpoint.find import step_name
from mot_megatron.checkpoint.save import Background
from mot_megatron.errors import CheckpointError
from mot_megatron.model.sharding import ParameterSharding
from mot_megatron.parallel.groups import ProcessGroups, build_process_groups
from tests.checkpoint.states import save, state
from tests.ranks import run_ranks

SHARDING = ParameterSharding((200, 1000), 1)


def silent(_line: str) -> None:
    pass


class Saves:
    """Saves of a directory, with the tensors of a state."""

    def __init__(
        self, directory: Path, groups: ProcessGroups, tensors: list[NamedTensor] | None = None
    ) -> None:
        self.directory = directory
        self.groups = groups
        self.tensors = tensors
        self.may_begin = threading.Event()

    def write(self, step: int, background: Background | None) -> CheckpointInfo:
        assert self.may_begin.wait(60)
        return save_checkpoint(
            self.directory,
            step,
            self.tensors or state(step, self.groups),
            metadata={"step": step},
            config_text="[run]\n",
            groups=self.groups,
            keep=3,
            background=background,
        )


def save_both_ways(directory: Path) -> None:
    groups = build_process_groups(2, torch.device("cpu"))
    writer = BackgroundWriter()
    saves = Saves(directory / "background", groups)
    for step in (1, 2):
        saves.may_begin.clear()
        writer.start(lambda *, background, step=step: saves.write(step, background))
        assert writer.is_busy
        assert not writer.is_done
        assert not writer.has_failed
        with pytest.raises(AssertionError, match="a save is in progress"):
            writer.start(lambda *, background: saves.write(0, background))
        saves.may_begin.set()
        # Collectives of training, in another order than the thread's.
        for number in range(20):
            total = torch.full((100,), float(groups.rank + number))
            dist.all_reduce(total)
            assert (total == 6 + 4 * number).all()  # 0 + 1 + 2 + 3 + 4 * number
        written = writer.take(silent)
        assert written.checkpoint.step == step
        assert not writer.is_busy
        direct = Saves(directory / "direct", groups)
        direct.may_begin.set()
        direct.write(step, None)
    assert writer.close() is None


def test_bytes_equal_those_of_a_save_that_stops_training(tmp_path: Path) -> None:
    run_ranks(save_both_ways, 4, tmp_path)
    for step in (1, 2):
        one, other = (tmp_path / name / step_name(step) for name in ("background", "direct"))
        names = sorted(path.name for path in one.iterdir())
        assert names == sorted(path.name for path in other.iterdir())
        assert len(names) == 8  # four ranks' tensors, index, metadata, configuration, manifest
        for name in names:
            assert (one / name).read_bytes() == (other / name).read_bytes(), name


def fill_the_disk_of_one_rank(directory: Path) -> tuple[str, list[str], int | None]:
    groups = build_process_groups(2, torch.device("cpu"))
    writer = BackgroundWriter()
    saves = Saves(directory, groups, [NamedTensor("w", torch.ones(200, 500), SHARDING)])
    saves.may_begin.set()
    writer.start(lambda *, background: saves.write(1, background))
    writer.take(silent)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    if groups.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))
    writer.start(lambda *, background: saves.write(2, background))
    with pytest.raises(CheckpointError) as caught:
        writer.take(silent)
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    left = sorted(path.name for path in directory.iterdir())
    dist.barrier()
    writer.start(lambda *, background: saves.write(3, background))
    assert writer.close() is None
    newest = find_checkpoint(directory).checkpoint
    return str(caught.value), left, newest and newest.step


def test_failure_on_one_rank_is_the_same_error_on_all(tmp_path: Path) -> None:
    first, second = run_ranks(fill_the_disk_of_one_rank, 2, tmp_path)
    assert first == second
    assert f"cannot save checkpoint {tmp_path}/step_00000002: File too large (rank 1)" in first[0]
    assert first[1:] == (["step_00000001"], 3)


def test_failure_is_known_before_it_is_raised_and_waiting_shows_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mot_megatron.checkpoint.background._FIRST_NOTE_SECONDS", 0.01)
    monkeypatch.setattr("mot_megatron.checkpoint.background._NOTE_SECONDS", 0.01)
    go_on = threading.Event()
    lines: list[str] = []

    def slow(*, background: Background | None) -> CheckpointInfo:
        assert background is not None
        background.progress.total = 4_000_000
        background.progress.update(1_000_000)
        assert go_on.wait(60)
        background.progress.update(3_000_000)
        return save(tmp_path, 1)

    def say(line: str) -> None:
        lines.append(line)
        if len(lines) == 2:
            go_on.set()

    writer = BackgroundWriter()
    assert writer.is_done
    writer.start(slow)
    assert writer.take(say).checkpoint.step == 1
    assert lines[0] == "waiting for the save in progress: 1.0 of 4.0 MB written after 0 s"
    assert "4.0 MB written, but not yet flushed and hashed on all ranks" in writer.progress

    (tmp_path / "file").write_text("")
    writer.start(lambda **_: save(tmp_path / "file" / "checkpoints", 1))
    error = writer.close()
    assert isinstance(error, CheckpointError)
    assert writer.has_failed
    with pytest.raises(CheckpointError, match="Not a directory"):
        writer.take(silent)
    assert not writer.has_failed
