"""Training jobs that other commands start with the deepspeed launcher."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mot_megatron.job.hosts import LAUNCHER, Hosts
from mot_megatron.job.ports import free_port
from mot_megatron.job.processes import descendants_of, session_of

_SUPERVISOR = (sys.executable, "-m", "mot_megatron.cli.supervise", "--restarts", "20")
_POLL_SECONDS = 0.05


class Ended(NamedTuple):
    """How a job ended."""

    status: int | None
    """Exit status of the launcher; None if it had to be killed because it did not end."""
    errors: tuple[str, ...]
    """Lines of the output that begin with ``error:``, each once."""
    has_traceback: bool
    last_step: int
    """Last step in the output, or 0."""
    survivors: int
    """Processes of the job that were still there after the launcher, and were killed."""


class Job:
    """One training job in a session of its own, which writes its output to a file."""

    def __init__(
        self,
        arguments: Sequence[str],
        world_size: int,
        output: Path,
        environment: Mapping[str, str],
        hosts: Hosts | None = None,
        is_supervised: bool = False,
        directory: Path | None = None,
    ) -> None:
        """Start the job.

        Args:
            arguments: Arguments of ``mot_megatron.cli.train``.
            world_size: Number of ranks.
            output: File for the output of all processes.
            environment: All environment variables of the job.
            hosts: Machines on which it runs; None for this one alone.
            is_supervised: Start it under ``mot supervise``, on this machine.
            directory: Working directory, from which Python also imports; None for the present one.
        """
        port = free_port()
        self.output = output
        self.is_supervised = is_supervised
        self._begin = time.monotonic()
        launcher = [*LAUNCHER, "--num_accelerators", str(world_size), "--master_port", str(port)]
        if hosts is not None:
            launcher = hosts.command(world_size, port, output.with_suffix(".hosts"))
        if is_supervised:
            # The supervisor starts the launcher with these options.
            launcher = [*_SUPERVISOR, "--", *launcher[len(LAUNCHER) :]]
        with output.open("wb") as stream:
            self.process = subprocess.Popen(
                [*launcher, "--module", "mot_megatron.cli.train", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                cwd=directory,
                start_new_session=True,
            )
        self._seen: set[int] = set()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._begin

    @property
    def is_running(self) -> bool:
        """Whether the launcher runs."""
        return self.process.poll() is None

    def ranks(self) -> list[int]:
        """Return the process IDs of the ranks that have started, by local rank."""
        found: dict[int, int] = {}
        for pid in self.descendants():
            match = re.search(rb"--local_rank=(\d+)", _command_line(pid))
            if match:
                found[int(match[1])] = pid
        return [found[rank] for rank in sorted(found)]

    def descendants(self) -> list[int]:
        """Return the process IDs below the launcher, and remember them."""
        found = descendants_of(self.process.pid)
        self._seen.update(found)
        return found

    @property
    def step(self) -> int:
        """Last step in the output, or 0."""
        return _last_step(self.output.read_text(errors="replace"))

    def wait(
        self, seconds: float, step: int | None = None, poll_seconds: float = _POLL_SECONDS
    ) -> bool:
        """Wait until the launcher ends, or until the output shows a step.

        Args:
            seconds: How long to wait at most.
            step: The step; None to wait only for the end.
            poll_seconds: Interval between looks, each of which takes some milliseconds.

        Returns:
            Whether the launcher has ended.
        """
        deadline = time.monotonic() + seconds
        while self.is_running and time.monotonic() < deadline:
            if step is not None and self.step >= step:
                break
            self.descendants()
            time.sleep(poll_seconds)
        return not self.is_running

    def end(self, seconds: float) -> Ended:
        """Wait until all processes have ended, kill what has not after ``seconds``, and report."""
        ended = self.wait(seconds)
        deadline = time.monotonic() + (seconds if ended else 0)
        while (left := self._left()) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        if not ended:
            self.process.kill()
        status = self.process.wait()
        text = self.output.read_text(errors="replace")
        errors = dict.fromkeys(re.findall(r"^error: .*", text, re.MULTILINE))
        return Ended(
            status if ended else None,
            tuple(errors),
            "Traceback (most recent call last)" in text,
            _last_step(text),
            len(left),
        )

    def _left(self) -> list[int]:
        """Return the processes of this job's session that still run."""
        return [pid for pid in self._seen if session_of(pid) == self.process.pid]


def _last_step(text: str) -> int:
    steps = re.findall(r"^step +([\d,]+)/", text, re.MULTILINE)
    return int(steps[-1].replace(",", "")) if steps else 0


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
