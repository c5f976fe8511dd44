"""The checkpoints of a run: when they are written, and what the user is told about them.

A save stops training while the state is copied to host memory (the stall), and is then written
beside the following steps. A failure ends the run after the step in which it is noticed.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from mot_megatron.checkpoint.background import BackgroundWriter, Written
from mot_megatron.errors import CheckpointError
from mot_megatron.run.console import Console
from mot_megatron.run.lock import RunLock
from mot_megatron.run.metrics import TensorBoardLog
from mot_megatron.train.session import Session
from mot_megatron.train.staging import Staging
from mot_megatron.train.state import Progress, stage

_SLOW_SECONDS = 10.0
"""A save that takes longer is mentioned with every report."""


@dataclass
class _Stall:
    """What a save has cost training so far."""

    step: int
    seconds: float


class RunSaver:
    """Saves a run; all ranks make the same calls. Leaving its block waits for the last save."""

    def __init__(
        self,
        session: Session,
        lock: RunLock,
        damaged: Collection[Path],
        saved_steps: int | None,
        console: Console,
        log: TensorBoardLog | None,
    ) -> None:
        """Prepare for saves. Collective over the world.

        Args:
            session: The run.
            lock: Says whether the folder still belongs to this job, before a save changes it.
            damaged: Checkpoints that failed verification when the run was resumed.
            saved_steps: Steps done at the checkpoint from which the run was resumed, if any.
            console: Prints a line for every save.
            log: Receives the times of every save.
        """
        asynchronous = session.config.checkpoint.asynchronous
        if asynchronous is None:
            asynchronous = session.groups.device.type == "cpu"
        self._asynchronous = asynchronous
        self._writer = BackgroundWriter(lock.confirm)
        self._staging = Staging()
        self._session = session
        self._damaged = damaged
        self._console = console
        self._log = log
        self._stall = _Stall(-1 if saved_steps is None else saved_steps, 0.0)
        self._complete = saved_steps

    def __enter__(self) -> RunSaver:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for the save in progress, even after an error; its own error comes second.

        Every rank that is alive still runs its part of the save, so that the wait ends; if a
        process was lost, the watchdog ends this one.
        """
        if error is None:
            self.wait()
        if (problem := self._writer.close()) is not None:
            self._console.say(f"the save in progress failed too: {problem}")

    @property
    def has_failed(self) -> bool:
        """Whether the save in progress has failed, as far as this rank knows.

        All ranks must hear of it before one of them calls ``wait``, which raises the error.
        """
        return self._writer.has_failed

    def save(self, progress: Progress) -> None:
        """Save the present state unless it was saved; return as soon as training may continue.

        Waits for the save before it. Collective over the world.

        Raises:
            CheckpointError: The save before this one failed; or this one, if it is synchronous.
            TrainingError: A weight or optimizer state is not finite.
        """
        if self._stall.step == progress.steps:
            return
        self.wait()
        begin = time.perf_counter()
        save = stage(self._session, progress, self._damaged, self._staging)
        self._stall = _Stall(progress.steps, time.perf_counter() - begin)
        self._writer.start(save)
        if not self._asynchronous:
            self.wait()

    def went_back(self, steps: int, damaged: Collection[Path], log: TensorBoardLog | None) -> None:
        """Go on from the checkpoint of ``steps``; no save may be in progress.

        Args:
            steps: Steps done at the checkpoint that was restored.
            damaged: Further checkpoints that failed verification.
            log: Receives the times of later saves.
        """
        self._stall = _Stall(steps, 0.0)
        self._complete = steps
        self._damaged = {*self._damaged, *damaged}
        self._log = log

    def look(self) -> None:
        """Report the save in progress if it is complete; no collectives, and no error."""
        writer = self._writer
        if writer.is_busy and writer.is_done and not writer.has_failed:
            self._report(writer.take(self._console.say))

    def wait(self) -> None:
        """Wait for the save in progress, if any, and report it.

        Raises:
            CheckpointError: It failed; raised on every rank.
        """
        if self._writer.is_busy:
            begin = time.perf_counter()
            written = self._writer.take(self._console.say)
            self._stall.seconds += time.perf_counter() - begin
            self._report(written)

    def describe_newest(self) -> str:
        """Wait for the save in progress and describe the newest complete checkpoint."""
        try:
            self.wait()
        except CheckpointError as problem:
            return f"{self._newest()} ({problem})"
        return self._newest()

    def say_if_slow(self) -> None:
        """Print how far the save in progress is if it takes long."""
        writer = self._writer
        if writer.is_busy and writer.seconds > _SLOW_SECONDS:
            step = self._stall.step
            self._console.say(f"writing the checkpoint of step {step}: {writer.progress}")

    def _newest(self) -> str:
        return "none was saved yet" if self._complete is None else f"step {self._complete}"

    def _report(self, written: Written) -> None:
        stall, checkpoint = self._stall, written.checkpoint
        self._complete = checkpoint.step
        self._console.say(
            f"checkpoint of step {checkpoint.step}: {checkpoint.num_bytes / 1e6:.1f} MB written in"
            f" {written.seconds:.2f} s; training stood still for {stall.seconds:.2f} s"
        )
        if self._log:
            self._log.log_save(checkpoint.step, stall.seconds, written.seconds)
