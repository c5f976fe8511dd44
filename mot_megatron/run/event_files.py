"""TensorBoard event files, written so that a full disk loses points but does not end the run."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

_NAME = re.compile(r"events\.out\.tfevents\.(\d+)\.(?:\d{6}\.)?(.*)")
"""Name of an event file: time of creation, a number if ``move_behind_the_clock`` renamed it, host,
process and counter."""
_REOPEN_SECONDS = 30.0
_LOSSES = (OSError, RuntimeError, ValueError)
"""Errors that torch and tensorboard raise, at once or at the next event, if a file cannot be
written."""


class EventWriter:
    """A ``SummaryWriter`` that loses events instead of raising errors, and tries again later."""

    def __init__(self, directory: Path, purge_step: int, say: Callable[[str], None]) -> None:
        """Open a new event file that TensorBoard reads after all existing ones.

        Args:
            directory: Folder of the event files.
            purge_step: Hide events of this step and later steps in older files.
            say: Prints a line; called when events start to be lost and when writing works again.
        """
        self._directory = directory
        self._say = say
        self._lost = 0
        self._retry_at = 0.0
        self._writer: SummaryWriter | None = None
        _silence_lost_writers()
        self._open(purge_step)

    def write(self, add: Callable[[SummaryWriter], None]) -> None:
        """Call ``add`` with the writer, or count a lost event if nothing can be written."""
        if self._writer is None and time.monotonic() >= self._retry_at:
            self._open(None)
        if self._writer is None:
            self._lost += 1
            return
        try:
            add(self._writer)
        except _LOSSES as error:
            self._give_up(error)

    def flush(self) -> None:
        """Write buffered events to disk."""
        self.write(SummaryWriter.flush)

    def close(self) -> None:
        """Flush and close the event file."""
        if self._writer is not None:
            try:
                self._writer.close()
            except _LOSSES as error:
                self._give_up(error)
        self._writer = None

    def _open(self, purge_step: int | None) -> None:
        try:
            move_behind_the_clock(self._directory)
            self._writer = SummaryWriter(str(self._directory), purge_step=purge_step)
        except _LOSSES as error:
            self._give_up(error)
            return
        if self._lost:
            self._say(f"TensorBoard: writing again; {self._lost} events were lost")
            self._lost = 0

    def _give_up(self, error: Exception) -> None:
        if self._lost == 0:
            reason = getattr(error, "strerror", None) or str(error)
            self._say(
                f"TensorBoard: {self._directory} cannot be written: {reason}; points are lost, and"
                " training goes on"
            )
        self._lost += 1
        self._retry_at = time.monotonic() + _REOPEN_SECONDS
        if self._writer is not None:
            with contextlib.suppress(*_LOSSES):
                self._writer.close()
        self._writer = None


def move_behind_the_clock(directory: Path) -> None:
    """Rename event files with a future creation time, so that a file created now is read last.

    TensorBoard reads files in the order of their names, which contain the time of creation. If the
    clock is behind after a restart, new points would otherwise be hidden.
    """
    now = int(time.time())
    dated = [
        (path, match)
        for path in sorted(directory.glob("events.out.tfevents.*"))
        if (match := _NAME.fullmatch(path.name))
    ]
    # Include the last second, because its files could sort on either side of a new file.
    late = [(path, match) for path, match in dated if int(match[1]) >= now - 1]
    for number, (path, match) in enumerate(late):
        path.rename(path.with_name(f"events.out.tfevents.{now - 1:010d}.{number:06d}.{match[2]}"))


def _silence_lost_writers() -> None:
    """Keep tensorboard's writer threads from printing a traceback when the disk is full.

    The main thread gets the same error when it adds the next event.
    """
    if getattr(threading.excepthook, "silences_lost_writers", False):
        return
    previous = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs, /) -> None:
        is_writer = type(arguments.thread).__module__.startswith("tensorboard.")
        if not (is_writer and isinstance(arguments.exc_value, OSError)):
            previous(arguments)

    hook.silences_lost_writers = True  # type: ignore[attr-defined]
    threading.excepthook = hook
