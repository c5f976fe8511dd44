"""Start a job with the deepspeed launcher, and again after a failure that a restart can mend.

On several nodes without ssh, every node has a launcher and a supervisor. The supervisor of the
first node decides (see ``relaunch``) once its own ranks have ended, so that no rank of the next job
meets a process of the last one there. The others follow, whatever status their own launcher had.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from mot_megatron.job.processes import Process, group_members
from mot_megatron.job.verdict import LOST_STATUS, USER_ERROR_STATUS
from mot_megatron.run.lock import BEAT_SECONDS, LOCK_FILE
from mot_megatron.run.outcome import STOP_FILE, forget_outcome, read_outcome, read_step
from mot_megatron.run.relaunch import (
    Decision,
    Failure,
    Record,
    RestartPolicy,
    newest_checkpoint,
)

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_POLL_SECONDS = 0.2
LEAVE_SECONDS = 60.0
"""How long ranks whose launcher has ended may take to finish a step, save, and exit. They are then
killed."""
_FAR_SECONDS = 600.0
"""The same for ranks on other hosts, which a killed launcher leaves behind. They are not killed."""
FOLLOW_SECONDS = 900.0
"""How long to wait for the decision of the first node; ranks wait 600 s for each other."""


@dataclass(frozen=True)
class Task:
    """What to run."""

    command: tuple[str, ...]
    """The launcher with all arguments."""
    run_directory: Path
    node: int = 0
    """Number of this node, if every node has a launcher of its own; 0 decides for all."""
    has_followers: bool = False
    """Whether other nodes have launchers and supervisors of their own."""
    status_if_stopped: int = 0
    """Exit status of the first node if the run was stopped by a signal before its last step."""


class Supervisor:
    """Runs a task until it is done, is stopped, or fails in a way that a restart does not mend.

    SIGINT, SIGTERM, SIGUSR1 and SIGHUP make the run save and stop. A second SIGINT or SIGTERM is
    passed on to the launcher, which then kills its ranks within 30 s.
    """

    def __init__(self, task: Task, policy: RestartPolicy, say: Callable[[str], None]) -> None:
        self._task = task
        self._policy = policy
        self._say = say
        self._record = Record(task.run_directory)
        self._signals: list[signal.Signals] = []
        self._launcher: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """Run the task and return the exit status."""
        previous = {number: signal.signal(number, self._on_signal) for number in _signals()}
        try:
            while True:
                count = len(self._record)
                status = self._run_once()
                decision = self._decide(status) if self._task.node == 0 else self._follow(count)
                if not decision.restart or (self._signals and self._task.node > 0):
                    self._say(decision.reason)
                    return decision.status
                self._say(f"starting again: {decision.reason}")
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _run_once(self) -> int:
        """Run the launcher to its end, and wait until its ranks on this node have ended."""
        if self._task.node == 0:
            forget_outcome(self._task.run_directory)
        # A group of its own: Ctrl-C reaches this process alone, and the ranks are found later.
        launcher = self._launcher = subprocess.Popen(
            self._task.command,
            stdin=subprocess.DEVNULL,
            process_group=0,
            preexec_fn=_ignore_sigusr1,  # this process has one thread
        )
        while launcher.poll() is None:
            if self._signals:
                self._request_stop()
            time.sleep(_POLL_SECONDS)
        self._let_ranks_leave(launcher.pid)
        if launcher.returncode < 0 and self._task.node == 0:
            self._let_far_ranks_leave()
        if self._signals:
            with contextlib.suppress(OSError):
                (self._task.run_directory / STOP_FILE).unlink()
        return launcher.returncode

    def _decide(self, status: int) -> Decision:
        decision = self._judge(status)
        # A run that simply ends on one node needs no record.
        if decision.restart or self._task.has_followers:
            try:
                self._record.add(decision)
            except OSError as error:
                reason = f"not started again: its record cannot be written: {error.strerror}"
                return Decision(restart=False, status=status or LOST_STATUS, reason=reason)
        return decision

    def _judge(self, status: int) -> Decision:
        run = self._task.run_directory
        outcome = read_outcome(run)
        if outcome is not None and outcome.kind == "done":
            return Decision(restart=False, status=0, reason=f"done after step {outcome.step}")
        if outcome is not None and (self._signals or not outcome.launcher_ended):
            place = f"after step {outcome.step}" if outcome.step else "before its first step"
            asked = f"stopped {place}: {outcome.reason or 'on request'}"
            unfinished = self._task.status_if_stopped if self._signals else 0
            return Decision(restart=False, status=unfinished, reason=asked)
        failed = status if status > 0 else LOST_STATUS
        if status == USER_ERROR_STATUS:
            reason = "not started again: a restart does not mend this error"
            return Decision(restart=False, status=failed, reason=reason)
        if self._signals:
            reason = f"not started again: asked to stop by {self._signals[0].name}"
            return Decision(restart=False, status=failed, reason=reason)
        failure = Failure(read_step(run), newest_checkpoint(run))
        if objection := self._policy.object_to(failure):
            return Decision(restart=False, status=failed, reason=f"not started again: {objection}")
        how = f"the launcher ended with status {status}, {failure}"
        count = f"restart {self._policy.used} of at most {self._policy.most}"
        reason = f"{how} ({count} within {self._policy.within_seconds / 60:.0f} minutes)"
        return Decision(restart=True, status=failed, reason=reason)

    def _follow(self, count: int) -> Decision:
        """Wait for the decision of the first node, after ``count`` earlier ones."""
        deadline = time.monotonic() + FOLLOW_SECONDS
        while time.monotonic() < deadline:
            decision = self._record.after(count)
            if decision is not None:
                return Decision(
                    decision.restart,
                    # A stop by a signal is a success here, so that nobody kills the first node.
                    0 if decision.status == self._task.status_if_stopped else decision.status,
                    f"as on node 0: {decision.reason}",
                )
            time.sleep(_POLL_SECONDS)
        reason = f"not started again: no word from node 0 for {FOLLOW_SECONDS:.0f} s"
        return Decision(restart=False, status=LOST_STATUS, reason=reason)

    def _request_stop(self) -> None:
        run, launcher = self._task.run_directory, self._launcher
        assert launcher is not None
        # Only a job that has locked the folder looks for the file; it removes an earlier one.
        with contextlib.suppress(OSError):
            owner = _owner_of((run / LOCK_FILE).read_bytes())
            # The folder may be another job's, which will refuse this one.
            if owner and (not owner.is_here or owner.pid in group_members(launcher.pid)):
                (run / STOP_FILE).touch()

    def _let_ranks_leave(self, group: int) -> None:
        deadline = time.monotonic() + LEAVE_SECONDS
        while left := group_members(group):
            if time.monotonic() > deadline:
                self._say(f"killing {len(left)} processes that the launcher left behind")
                for pid in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                return
            time.sleep(_POLL_SECONDS)

    def _let_far_ranks_leave(self) -> None:
        """Ask ranks on other hosts to stop, after the death of the launcher that held them."""
        lock = self._task.run_directory / LOCK_FILE
        deadline = time.monotonic() + _FAR_SECONDS
        content, changed = b"", time.monotonic()
        while time.monotonic() < deadline:
            try:
                now = lock.read_bytes()
            except OSError:
                return
            if now != content:
                content, changed = now, time.monotonic()
            # The owner rewrites the file every few seconds while it lives.
            owner = _owner_of(content)
            if (owner and owner.is_dead) or time.monotonic() - changed > 3 * BEAT_SECONDS:
                return
            self._request_stop()
            time.sleep(_POLL_SECONDS)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        again = bool(self._signals) and number in (signal.SIGINT, signal.SIGTERM)
        self._signals.append(signal.Signals(number))
        if again and self._launcher is not None:
            with contextlib.suppress(ProcessLookupError):
                self._launcher.terminate()


def _signals() -> Sequence[signal.Signals]:
    """Return the signals to handle; nohup ignores SIGHUP."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in _SIGNALS if number != signal.SIGHUP or not ignored]


def _ignore_sigusr1() -> None:
    # SLURM sends it to all processes of a task. The launcher would die of it; ranks handle it.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _owner_of(lock: bytes) -> Process | None:
    """Return the process that a lock names; None if the file is incomplete."""
    try:
        return Process(**json.loads(lock)["owner"])
    except (ValueError, LookupError, TypeError):
        return None
