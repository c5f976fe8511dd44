"""Train the runs of a comparison as separate processes, a few side by side.

Console output of a run goes to its log, from which its progress is read. A request to stop is
passed on to the runs, which save a checkpoint and exit; the same command then continues them. Only
one comparison at a time may use an output folder. It holds a lock that every run inherits, so runs
left behind by a killed comparison also keep the folder locked.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

from mot_megatron.compare.experiment import PlannedRun
from mot_megatron.errors import DataError, UserError
from mot_megatron.job.exclusive import exclusive
from mot_megatron.job.stop import StopRequest
from mot_megatron.run.console import WIDTH, duration

LOCK_FILE = ".lock"
_POLL_SECONDS = 0.2
_STEP_LINE = re.compile(rb"^step +(\d+)/", re.MULTILINE)
_TAIL_BYTES = 1 << 14


@dataclass(frozen=True)
class Launch:
    """How to start runs."""

    trainer: Sequence[str]
    """Training command, to which a run's arguments are appended."""
    environment: Mapping[str, str]
    """Complete environment of a run's process."""
    logs: Path
    """Folder of the runs' logs."""
    parallel: int
    """Maximum number of runs at a time."""

    def command(self, run: PlannedRun) -> list[str]:
        """Return the command that trains a run."""
        return [*self.trainer, *run.arguments]

    def log(self, run: PlannedRun) -> Path:
        """Return the path of a run's log, which receives its console output."""
        return self.logs / f"{run.name}.log"


@dataclass
class Outcome:
    """How the runs ended."""

    failures: list[str] = field(default_factory=list)
    """One line for every run that failed."""
    stopped: bool = False
    """Whether a request to stop left runs unfinished."""


@contextlib.contextmanager
def sole_user(output: Path) -> Iterator[int]:
    """Lock an output folder; yields the lock's file descriptor, for runs to inherit.

    Raises:
        DataError: Another comparison holds the lock, or the folder cannot be created.
    """
    problem = f"{output}: in use by another comparison, or by a run it left behind"
    with contextlib.ExitStack() as stack:
        try:
            output.mkdir(parents=True, exist_ok=True)
            descriptor = stack.enter_context(exclusive(output / LOCK_FILE, problem))
        except OSError as error:
            raise DataError(f"{error.filename}: {error.strerror}") from None
        yield descriptor


def train_all(
    runs: Sequence[PlannedRun],
    ended_before: Sequence[PlannedRun],
    launch: Launch,
    lock: int,
    on_end: Callable[[PlannedRun], None],
) -> Outcome:
    """Train runs, starting them in the given order; if one fails, the others continue.

    Ctrl-C, SIGTERM, SIGUSR1 and a closed terminal stop all runs, which save a checkpoint first.

    Args:
        runs: Runs to train.
        ended_before: The other runs of the comparison, for the progress display.
        launch: How to start the runs.
        lock: File descriptor that runs inherit, from ``sole_user``.
        on_end: Called when a run has finished its last step; if it raises UserError, the run counts
            as failed.
    """
    launch.logs.mkdir(parents=True, exist_ok=True)
    outcome, stopping = Outcome(), False
    waiting = deque(runs)
    display = _Display([*ended_before, *runs], ended_before, launch)
    with StopRequest() as stop, contextlib.closing(display), _Jobs(launch, lock) as jobs:
        while waiting or jobs.running:
            if stop.requested and not stopping:
                stopping = True
                outcome.stopped = bool(waiting)
                waiting.clear()
                display.say("asked to stop: the runs save and exit")
                jobs.stop()
            while waiting and len(jobs.running) < launch.parallel:
                run = waiting.popleft()
                jobs.start(run)
                display.say(f"{run.name}: started, console in {launch.log(run)}")
            for run, status in jobs.take_ended():
                if stopping and status in (0, -signal.SIGTERM) and not run.has_ended:
                    outcome.stopped = True
                else:
                    _end(run, status, launch, outcome, on_end, display)
            display.update(list(jobs.running))
            time.sleep(_POLL_SECONDS)
    return outcome


def steps_done(log: Path) -> int:
    """Return the last step reported in a log; 0 if there is none."""
    found = _STEP_LINE.findall(_tail(log))
    return int(found[-1]) if found else 0


def last_error(log: Path) -> str:
    """Return the last error in a log, or its last line if there is no error."""
    lines = [line for line in _tail(log).decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["no console output"])[-1].strip()


def _end(
    run: PlannedRun,
    status: int,
    launch: Launch,
    outcome: Outcome,
    on_end: Callable[[PlannedRun], None],
    display: _Display,
) -> None:
    """Record a run whose process has ended if it finished; otherwise report why it failed."""
    failure = None
    if status == 0 and run.has_ended:
        try:
            on_end(run)
        except UserError as error:
            failure = str(error)
        else:
            display.count(run)
            return
    elif status == 0:
        failure = "stopped before its last step"
    else:
        failure = f"status {status}: {last_error(launch.log(run))}"
    line = f"{run.name} failed: {failure} (console in {launch.log(run)})"
    outcome.failures.append(line)
    display.say(line)


class _Jobs:
    """The running processes; leaving the ``with`` block stops them and waits for them."""

    def __init__(self, launch: Launch, lock: int) -> None:
        self._launch = launch
        self._lock = lock
        self.running: dict[PlannedRun, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> _Jobs:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
        for process in self.running.values():
            process.wait()

    def start(self, run: PlannedRun) -> None:
        command = self._launch.command(run)
        with self._launch.log(run).open("ab") as console:
            console.write(f"$ {shlex.join(command)}\n".encode())
            console.flush()
            self.running[run] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                env=dict(self._launch.environment),
                # In a new session, Ctrl-C reaches only the comparison, which passes it on.
                start_new_session=True,
                pass_fds=(self._lock,),
            )

    def stop(self) -> None:
        """Ask all runs to save a checkpoint and exit."""
        for process in self.running.values():
            process.terminate()

    def take_ended(self) -> list[tuple[PlannedRun, int]]:
        """Remove the runs whose processes have exited, and return them with their exit statuses."""
        ended = [
            (run, status)
            for run, process in self.running.items()
            if (status := process.poll()) is not None
        ]
        for run, _ in ended:
            del self.running[run]
        return ended


class _Display:
    """A progress bar over the steps of all runs, and a line when a run starts or ends."""

    def __init__(
        self, runs: Sequence[PlannedRun], ended: Sequence[PlannedRun], launch: Launch
    ) -> None:
        self._launch = launch
        self._steps = {run: run.config.training.train_steps for run in runs}
        self._done = {
            run: self._steps[run] if run in ended else steps_done(launch.log(run)) for run in runs
        }
        self._num_ended = len(ended)
        self._first, self._begun = sum(self._done.values()), time.monotonic()
        # smoothing=0: runs start and end, so the mean speed estimates the time left best.
        self._bar = tqdm(
            total=sum(self._steps.values()), initial=self._first, unit="step", ncols=WIDTH,
            smoothing=0, disable=None, leave=False,
        )  # fmt: skip

    def close(self) -> None:
        self._bar.close()

    def say(self, line: str) -> None:
        self._bar.write(line)
        sys.stdout.flush()  # otherwise lines are delayed if stdout is a file

    def count(self, run: PlannedRun) -> None:
        """Count a run that has finished, and say how many are done."""
        self._done[run] = self._steps[run]
        self._num_ended += 1
        self.say(f"{run.name}: done, {self._num_ended} of {len(self._steps)} runs{self._left()}")

    def update(self, running: Sequence[PlannedRun]) -> None:
        self._done |= {run: steps_done(self._launch.log(run)) for run in running}
        self._bar.set_description(f"runs {self._num_ended}/{len(self._steps)}", refresh=False)
        named = ", ".join(f"{run.name} {self._done[run]}" for run in running)
        self._bar.set_postfix_str(named, refresh=False)
        self._bar.update(sum(self._done.values()) - self._bar.n)

    def _left(self) -> str:
        steps = sum(self._done.values())
        missing = sum(self._steps.values()) - steps
        if not missing or steps == self._first:
            return ""
        seconds = (time.monotonic() - self._begun) * missing / (steps - self._first)
        return f", about {duration(seconds)} left"


def _tail(log: Path) -> bytes:
    if not log.exists():
        return b""
    with log.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - _TAIL_BYTES))
        return stream.read()
