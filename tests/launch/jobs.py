"""Multi-process jobs, started by the real launcher on the loopback interface."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.launch.entry_points import ROOT
from tests.ranks import ENVIRONMENT

SCRIPT = "launch/train.py"
LAUNCHER = [sys.executable, "-m", "deepspeed.launcher.runner"]  # the command ``deepspeed``
SECONDS_TO_NOTICE_A_DEATH = 60


@contextmanager
def started(
    folder: Path, command: list[str], environment: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command in its own session; kill all its remaining processes at the end."""
    folder.mkdir(exist_ok=True)
    variables = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with (folder / "stdout").open("wb") as output, (folder / "stderr").open("wb") as errors:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**variables, **(environment or {})},
            stdout=output,
            stderr=errors,
            start_new_session=True,
        )
    family = psutil.Process(process.pid)
    descendants: list[psutil.Process] = []
    try:
        yield process
    finally:
        if process.poll() is None:
            descendants = family.children(recursive=True)
        for one in [*descendants, *([family] if process.poll() is None else [])]:
            if one.is_running():
                one.kill()
        process.wait()


def rank_process(job: subprocess.Popen[bytes], local_rank: int) -> psutil.Process:
    """Return the process of a job's rank, by its local rank on its node."""
    (found,) = [
        process
        for process in psutil.Process(job.pid).children(recursive=True)
        if f"--local_rank={local_rank}" in process.cmdline()
    ]
    return found


def assert_gone(ranks: list[psutil.Process], seconds: float) -> None:
    """Assert that all processes end within ``seconds``."""
    _, alive = psutil.wait_procs(ranks, seconds)
    assert not alive


def assert_one_line_reports_the_lost_rank(errors: str, rank: int, pid: int) -> None:
    """Assert that ``errors`` is one line that names the lost rank and its phase."""
    host = re.escape(socket.gethostname())
    phase = r"step \d+, (data|forward and backward|optimizer|evaluation|checkpoint|samples)"
    assert re.fullmatch(
        rf"error: rank {rank} \(host {host}, pid {pid}\) died during {phase}\n", errors
    ), errors
