"""A kill or a full disk during a conversion leaves nothing that looks like a checkpoint."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import pytest
import torch.multiprocessing as mp

from mot_megatron.checkpoint import open_checkpoint
from mot_megatron.cli import checkpoint_reshard, checkpoint_weights
from mot_megatron.conversion.source import CheckpointSource
from mot_megatron.errors import CheckpointError
from tests.conversion.states import TP2, config_of, error_of, names_in, values_of, write_source
from tests.ranks import PRELOAD

RESHARD = ("reshard", ["--world-size", "2", "--set", TP2])
WEIGHTS = ("weights", ["--dtype", "bf16"])
AVERAGE = ("weights", ["--average", "2"])
COMMANDS = {"reshard": checkpoint_reshard.main, "weights": checkpoint_weights.main}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("interrupted") / "a"
    for step in (6, 7):
        write_source(directory, config_of(), step)
    return directory


def killed(command: str, arguments: list[str], reads: int) -> None:
    """Run a command in this process, which kills itself before the given read of a tensor."""
    read_box, done = CheckpointSource.read_box, 0

    def counted(*given: object) -> object:
        nonlocal done
        done += 1
        if done > reads:
            os.kill(os.getpid(), signal.SIGKILL)
        return read_box(*given)  # type: ignore[arg-type]

    CheckpointSource.read_box = counted  # type: ignore[method-assign, assignment]
    COMMANDS[command](arguments)


@pytest.mark.parametrize(("command", "more"), [RESHARD, WEIGHTS, AVERAGE])
def test_a_kill_leaves_only_a_temporary_folder(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    more: list[str],
) -> None:
    arguments = [str(source), str(tmp_path / "b"), *more]
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    for reads in (0, 40):
        process = context.Process(target=killed, args=(command, arguments, reads))
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
        assert names_in(tmp_path / "b") == ["step_00000007.tmp"]
        with pytest.raises(CheckpointError, match="an unfinished save"):
            open_checkpoint(tmp_path / "b")
    assert COMMANDS[command](arguments) == 0
    assert names_in(tmp_path / "b") == ["step_00000007"]
    assert open_checkpoint(tmp_path / "b").checkpoint is not None
    capsys.readouterr()


@pytest.mark.parametrize(("command", "more"), [RESHARD, WEIGHTS, AVERAGE])
@pytest.mark.parametrize("limit", [100, 50_000])
def test_a_full_disk_leaves_nothing(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    more: list[str],
    limit: int,
) -> None:
    # The kernel fails writes beyond the limit, as it would on a full disk.
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
    try:
        status = COMMANDS[command]([str(source), str(tmp_path / "b"), *more, "--workers", "2"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert status == 2
    line = error_of(capsys)
    assert f"cannot write {tmp_path}/b/step_00000007: " in line
    assert "File too large" in line
    assert names_in(tmp_path / "b") == []
    assert sorted(names_in(source)) == ["step_00000006", "step_00000007"]


def test_other_unfinished_saves_are_left_alone(source: Path, tmp_path: Path) -> None:
    """They may be those of a run that is training."""
    (tmp_path / "b" / "step_00000009.tmp").mkdir(parents=True)
    command, more = RESHARD
    assert COMMANDS[command]([str(source), str(tmp_path / "b"), *more]) == 0
    assert names_in(tmp_path / "b") == ["step_00000007", "step_00000009.tmp"]
    assert len(CheckpointSource(tmp_path / "b").infos) == len(values_of(config_of()))
