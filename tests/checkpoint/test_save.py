"""Tests that a save is complete or leaves nothing, and deletes old checkpoints only at the end."""

from __future__ import annotations

import errno
import random
import resource
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mot_megatron.checkpoint import (
    NamedTensor,
    find_checkpoint,
    load_checkpoint,
    resolve_resume,
    save_checkpoint,
)
from mot_megatron.checkpoint import commit as commit_module
from mot_megatron.checkpoint.manifest import read_manifest, verify_files
from mot_megatron.checkpoint.storage import check_complete
from mot_megatron.errors import CheckpointError
from mot_megatron.model.sharding import ParameterSharding
from mot_megatron.parallel.groups import build_process_groups
from tests.checkpoint.states import SHARDINGS, differing_after_load, save, state
from tests.ranks import PRELOAD, run_ranks


def _names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def _save_with_little_room(directory: Path, full_ranks: tuple[int, ...]) -> str:
    groups = build_process_groups(2, torch.device("cpu"))
    sharding = ParameterSharding((200, 1000), 1)
    tensors = [NamedTensor("w", torch.ones(200, 500), sharding)]  # 400 kB on each rank
    arguments = {"metadata": {}, "config_text": "", "groups": groups, "keep": 5}
    save_checkpoint(directory, 1, tensors, **arguments)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    if groups.rank in full_ranks:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))
    with pytest.raises(CheckpointError) as caught:
        save_checkpoint(directory, 2, tensors, **arguments)
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    dist.barrier()
    assert _names(directory) == ["step_00000001"]
    dist.barrier()
    save_checkpoint(directory, 3, tensors, **arguments)
    newest = find_checkpoint(directory).checkpoint
    assert newest is not None
    assert newest.step == 3
    return str(caught.value)


@pytest.mark.parametrize("full_ranks", [(0,), (1,), (0, 1)])
def test_full_disk_on_some_ranks_is_the_same_error_on_all(
    tmp_path: Path, full_ranks: tuple[int, ...]
) -> None:
    # The kernel fails writes beyond the limit, as it would on a full disk.
    first, second = run_ranks(_save_with_little_room, 2, tmp_path, full_ranks)
    assert first == second
    assert "\n" not in first
    assert f"cannot save checkpoint {tmp_path}/step_00000002: " in first
    assert f"(rank {full_ranks[0]})" in first
    assert "File too large" in first
    assert "older checkpoints are untouched" in first


@pytest.mark.parametrize("name", ["write_durably", "write_manifest", "record_of", "sync_directory"])
def test_full_disk_after_the_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    save(tmp_path, 1)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(commit_module, name, refuse)
    with pytest.raises(CheckpointError, match=r"step_00000002: No space left on device; older"):
        save(tmp_path, 2)
    assert _names(tmp_path) == ["step_00000001"]


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="checkpoints: Not a directory") as caught:
        save(tmp_path / "file" / "checkpoints", 1)
    assert "\n" not in str(caught.value)


def test_missing_tensors_are_detected(tmp_path: Path) -> None:
    path = save(tmp_path, 1).path
    assert check_complete(path, SHARDINGS) == len(SHARDINGS)
    with pytest.raises(CheckpointError, match="1 tensors were not written, the first: lost"):
        check_complete(path, [*SHARDINGS, "lost"])
    data = path / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="is missing from the files"):
        check_complete(path, SHARDINGS)


def test_the_last_n_are_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, step, keep=2)
        assert _names(tmp_path) == [f"step_{kept:08d}" for kept in (step - 1, step) if kept > 0]


def test_damaged_checkpoints_are_neither_counted_nor_deleted(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "step_00000002" / "config.toml").write_text("")
    save(tmp_path, 4, keep=2)
    assert _names(tmp_path) == ["step_00000002", "step_00000003", "step_00000004"]


def test_checkpoints_of_later_steps_are_not_deleted(tmp_path: Path) -> None:
    for step in (1, 9):
        save(tmp_path, step)
    save(tmp_path, 2, keep=1)
    assert _names(tmp_path) == ["step_00000002", "step_00000009"]


def test_nothing_is_deleted_when_the_save_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        save(tmp_path, step)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(commit_module, "write_manifest", refuse)
    with pytest.raises(CheckpointError):
        save(tmp_path, 3, keep=1)
    assert _names(tmp_path) == ["step_00000001", "step_00000002"]


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 1, seed=5)
    info = save(tmp_path, 1, seed=6)
    assert differing_after_load(info, 6) == []
    assert _names(tmp_path) == ["step_00000001"]


def test_a_kill_while_the_same_step_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1, seed=5)
    rename = Path.rename

    def die_before_the_second(path: Path, target: Path) -> Path:
        if target.name == "step_00000001":
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", die_before_the_second)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 1, seed=6)
    older = resolve_resume(tmp_path).checkpoint
    assert older is not None
    assert differing_after_load(older, 5) == []
    save(tmp_path, 2)
    assert _names(tmp_path) == ["step_00000001", "step_00000002"]


def test_checkpoints_that_failed_verification_do_not_count(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    flipped = bytearray((tmp_path / "step_00000002" / "config.toml").read_bytes())
    flipped[0] ^= 1
    (tmp_path / "step_00000002" / "config.toml").write_bytes(flipped)
    search = resolve_resume(tmp_path)
    assert search.damaged == (tmp_path / "step_00000002",)
    save(tmp_path, 3, keep=2, damaged=search.damaged)
    assert _names(tmp_path) == ["step_00000001", "step_00000002", "step_00000003"]


def test_leftovers_of_a_killed_save_are_deleted(tmp_path: Path) -> None:
    (tmp_path / "step_00000007.tmp").mkdir()
    (tmp_path / "step_00000007.tmp" / "__0_0.distcp").write_bytes(b"half")
    save(tmp_path, 8)
    assert _names(tmp_path) == ["step_00000008"]


def test_the_folder_is_renamed_only_when_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    rename = Path.rename

    def watch(path: Path, target: Path) -> Path:
        if path.name == "step_00000001.tmp":
            seen.append(verify_files(path, read_manifest(path)))
            assert not target.exists()
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", watch)
    save(tmp_path, 1)
    assert seen == [None]


def test_duplicate_names_are_rejected(tmp_path: Path) -> None:
    tensors = state(1)
    with pytest.raises(ValueError, match="two tensors are named model/norm"):
        save_checkpoint(
            tmp_path,
            1,
            [*tensors, tensors[0]],
            metadata={},
            config_text="",
            groups=None,
            keep=1,
        )


SHARDING = ParameterSharding((64, 1024))  # 256 kB each


def _keep_saving(rank: int, store: Path, directory: Path, first: int, saved: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    groups = build_process_groups(1, torch.device("cpu"))
    for step in range(first, first + 10_000):
        tensors = [
            NamedTensor(f"w{i}", torch.full((64, 1024), float(step)), SHARDING) for i in (1, 2)
        ]
        save_checkpoint(
            directory, step, tensors, metadata={"s": step}, config_text="", groups=groups, keep=2
        )
        saved.send(step)


def _kill_while_saving(tmp_path: Path, trial: int, first: int, delay: float) -> int:
    """Start two ranks that save continuously, and kill both ``delay`` seconds after the first save.

    Returns:
        The last step that a rank reported as saved.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    receiver, sender = context.Pipe(duplex=False)
    store = tmp_path / f"store{trial}"
    ranks = [
        context.Process(
            target=_keep_saving, args=(rank, store, tmp_path / "checkpoints", first, sender)
        )
        for rank in (0, 1)
    ]
    for process in ranks:
        process.start()
    sender.close()
    assert receiver.poll(60)
    time.sleep(delay)
    for process in ranks:
        process.kill()
    last = first
    for process in ranks:
        process.join()
        assert process.exitcode == -signal.SIGKILL
    try:
        while receiver.poll():
            last = max(last, receiver.recv())
    except EOFError:
        pass
    return last


def test_a_kill_leaves_a_complete_recent_checkpoint(tmp_path: Path) -> None:
    generator = random.Random(0)
    last, interrupted = 0, 0
    for trial in range(10):
        last = _kill_while_saving(tmp_path, trial, last + 1, generator.uniform(0, 0.3))
        search = resolve_resume(tmp_path / "checkpoints")
        assert all("an unfinished save" in line for line in search.skipped)
        interrupted += len(search.skipped)
        assert search.checkpoint is not None
        # The last save reported, or one that was complete but not yet reported.
        assert last <= search.checkpoint.step <= last + 1
        tensors = [NamedTensor(name, torch.zeros(64, 1024), SHARDING) for name in ("w1", "w2")]
        load_checkpoint(search.checkpoint, tensors, None)
        assert all((named.tensor == search.checkpoint.step).all() for named in tensors)
        last = search.checkpoint.step
    assert interrupted > 0  # otherwise no kill hit a save, and this test shows nothing
