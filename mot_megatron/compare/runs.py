"""Train the runs of a comparison as processes of their own, a few side by side, until told to stop.

A run's console goes to its log, and how far it is, is read there. A stop is passed on: the runs
save and leave, and the same comparison goes on from there. Nobody may work in an output folder
twice: every run inherits a lock, so that one whose comparison was killed still counts.
"""

from __future__ import annotations

import contextlib
import fcntl
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
from mot_megatron.job.stop import StopRequest
from mot_megatron.run.console import WIDTH, duration

LOCK_FILE = ".lock"
_POLL_SECONDS = 0.2
_STEP_LINE = re.compile(rb"^step +(\d+)/", re.MULTILINE)
_TAIL_BYTES = 1 << 14


@dataclass(frozen=True)
class Launch:
    """How runs are started."""

    trainer: Sequence[str]
    """Command that a run's arguments follow."""
    environment: Mapping[str, str]
    """All variables of a run's process."""
    logs: Path
    """Folder of the consoles."""
    parallel: int
    """Runs side by side, at most."""

    def command(self, run: PlannedRun) -> list[str]:
        """That trains ``run``."""
        return [*self.trainer, *run.arguments]

    def log(self, run: PlannedRun) -> Path:
        """Where its console goes."""
        return self.logs / f"{run.name}.log"


@dataclass
class Outcome:
    """How the runs ended."""

    failures: list[str] = field(default_factory=list)
    """A line for every run that failed."""
    stopped: bool = False
    """Whether runs are left because of a stop."""


@contextlib.contextmanager
def sole_user(output: Path) -> Iterator[int]:
    """Hold the lock of an output folder, as a descriptor for runs to inherit.

    Raises:
        DataError: another comparison has it, or the folder cannot be made.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(output / LOCK_FILE, os.O_WRONLY | os.O_CREAT, 0o644)
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"{output}: another comparison, or a run that one left behind, works in there"
            ) from None
        yield descriptor
    finally:
        os.close(descriptor)


def train_all(
    runs: Sequence[PlannedRun],
    ended_before: Sequence[PlannedRun],
    launch: Launch,
    lock: int,
    on_end: Callable[[PlannedRun], None],
) -> Outcome:
    """Train ``runs`` in their order to their ends; after a failure the others go on.

    Ctrl-C, SIGTERM, SIGUSR1 and a closed terminal stop all runs, which save first.

    Args:
        runs: To train.
        ended_before: The others of the comparison, for the progress display.
        launch: How.
        lock: Descriptor that runs inherit.
        on_end: Called when a run has come to its last step; a UserError from it is a failure.
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
                display.say("asked to stop: the runs save and leave")
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
    """The last step that a console tells of; 0 if none."""
    found = _STEP_LINE.findall(_tail(log))
    return int(found[-1]) if found else 0


def last_error(log: Path) -> str:
    """The last error that a console tells of, or its last line."""
    lines = [line for line in _tail(log).decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["nothing on its console"])[-1].strip()


def _end(
    run: PlannedRun,
    status: int,
    launch: Launch,
    outcome: Outcome,
    on_end: Callable[[PlannedRun], None],
    display: _Display,
) -> None:
    """Sort a run that has left without being asked to into ended and failed."""
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
        failure = "it was stopped before its last step"
    else:
        failure = f"status {status}: {last_error(launch.log(run))}"
    line = f"{run.name} failed: {failure} (console in {launch.log(run)})"
    outcome.failures.append(line)
    display.say(line)


class _Jobs:
    """Running processes; those that are left at the end of a ``with`` block are stopped."""

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
                # A terminal's Ctrl-C reaches the comparison alone, which passes it on.
                start_new_session=True,
                pass_fds=(self._lock,),
            )

    def stop(self) -> None:
        """Ask all to save and leave."""
        for process in self.running.values():
            process.terminate()

    def take_ended(self) -> list[tuple[PlannedRun, int]]:
        """Those that have left since, with their statuses."""
        ended = [
            (run, status)
            for run, process in self.running.items()
            if (status := process.poll()) is not None
        ]
        for run, _ in ended:
            del self.running[run]
        return ended


class _Display:
    """One bar over the steps of all runs, and a line when a run starts or ends."""

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
        # smoothing=0: runs end and start, so that only the mean speed tells the time left.
        self._bar = tqdm(
            total=sum(self._steps.values()), initial=self._first, unit="step", ncols=WIDTH,
            smoothing=0, disable=None, leave=False,
        )  # fmt: skip

    def close(self) -> None:
        self._bar.close()

    def say(self, line: str) -> None:
        self._bar.write(line)
        sys.stdout.flush()  # a log of hours should not lag behind

    def count(self, run: PlannedRun) -> None:
        """A run has ended well."""
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
