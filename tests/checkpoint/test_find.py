"""Tests that damaged checkpoints are reported and skipped, and that no run restarts by mistake."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch

from mot_megatron.checkpoint import find_checkpoint, open_checkpoint, resolve_resume
from mot_megatron.errors import CheckpointError
from mot_megatron.parallel.groups import build_process_groups
from tests.checkpoint.states import differing_after_load, save
from tests.ranks import run_ranks

FILES = ["manifest.json", ".metadata", "metadata.json", "config.toml", "__0_0.distcp"]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pristine")
    save(directory, 1)
    save(directory, 2)
    return directory


@pytest.fixture
def directory(pristine: Path, tmp_path: Path) -> Path:
    shutil.copytree(pristine, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def _flip_random_bit(path: Path, generator: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    path.write_bytes(content)


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_is_detected(directory: Path, name: str) -> None:
    file = directory / "step_00000002" / name
    content = file.read_bytes()
    generator = random.Random(0)
    for _ in range(40):
        _flip_random_bit(file, generator)
        search = find_checkpoint(directory)
        assert search.checkpoint is not None
        assert search.checkpoint.step == 1
        assert len(search.skipped) == 1
        assert str(file.parent) in search.skipped[0]
        assert name in search.skipped[0]
        file.write_bytes(content)
    newest = find_checkpoint(directory).checkpoint
    assert newest is not None
    assert newest.step == 2


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncated", "missing", "longer"])
def test_other_damage_is_detected(directory: Path, name: str, damage: str) -> None:
    file = directory / "step_00000002" / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2] if damage == "truncated" else content + b"x")
    search = find_checkpoint(directory)
    assert search.checkpoint is not None
    assert search.checkpoint.step == 1
    assert name in search.skipped[0]


def test_a_renamed_checkpoint_is_skipped(directory: Path) -> None:
    (directory / "step_00000001").rename(directory / "step_00000009")
    search = find_checkpoint(directory)
    assert search.checkpoint is not None
    assert search.checkpoint.step == 2
    assert search.skipped == (f"{directory}/step_00000009: it is the checkpoint of step 1",)


def _find_on_ranks(directory: Path) -> tuple[int, tuple[str, ...], list[str]]:
    groups = build_process_groups(2, torch.device("cpu"))
    search = resolve_resume(directory)
    assert search.checkpoint is not None
    return (
        search.checkpoint.step,
        search.skipped,
        differing_after_load(search.checkpoint, 1, groups),
    )


def test_ranks_agree_on_what_they_skip(directory: Path) -> None:
    _flip_random_bit(directory / "step_00000002" / "__0_0.distcp", random.Random(1))
    first, second = run_ranks(_find_on_ranks, 2, directory)
    assert first == second
    reason = f"{directory}/step_00000002: __0_0.distcp does not match its SHA-256"
    assert first == (1, (reason,), [])


def test_resume_from_nothing(tmp_path: Path) -> None:
    assert resolve_resume(tmp_path / "absent").checkpoint is None
    assert resolve_resume(tmp_path).checkpoint is None
    (tmp_path / "step_00000001.tmp").mkdir()
    search = resolve_resume(tmp_path)
    assert search.checkpoint is None
    assert search.skipped == (f"{tmp_path}/step_00000001.tmp: an unfinished save",)


def test_resume_fails_if_all_checkpoints_are_damaged(directory: Path) -> None:
    (directory / "step_00000001" / "manifest.json").unlink()
    _flip_random_bit(directory / "step_00000002" / "__0_0.distcp", random.Random(2))
    with pytest.raises(CheckpointError) as caught:
        resolve_resume(directory)
    message = str(caught.value)
    assert "\n" not in message
    assert "step_00000001: manifest.json is missing" in message
    assert "step_00000002: __0_0.distcp does not match its SHA-256" in message
    assert "To start afresh, move this directory away" in message


def test_resume_fails_if_there_are_only_foreign_folders(tmp_path: Path) -> None:
    (tmp_path / "global_step100").mkdir()
    with pytest.raises(CheckpointError, match="global_step100: not a checkpoint of this program"):
        resolve_resume(tmp_path)


def test_a_file_in_place_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file: Not a directory"):
        resolve_resume(tmp_path / "file")


def test_open_accepts_a_checkpoint_or_a_checkpoint_directory(directory: Path) -> None:
    for path, step in [(directory / "step_00000001", 1), (directory, 2)]:
        checkpoint = open_checkpoint(path).checkpoint
        assert checkpoint is not None
        assert checkpoint.step == step


def test_open_refuses_a_renamed_checkpoint(directory: Path) -> None:
    (directory / "step_00000001").rename(directory / "step_00000005")
    with pytest.raises(CheckpointError, match="it is the checkpoint of step 1"):
        open_checkpoint(directory / "step_00000005")


def test_open_reports_why_nothing_is_usable(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: no such checkpoint directory"):
        open_checkpoint(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="contains no usable checkpoint: it is empty"):
        open_checkpoint(tmp_path / "empty")
    (directory / "step_00000002" / "config.toml").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot be used: config.toml has 0 bytes, not 6"):
        open_checkpoint(directory / "step_00000002")
