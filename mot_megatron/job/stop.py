"""Graceful stop: finish the step, save, and exit.

A stop is requested by SIGINT, SIGTERM, SIGUSR1 or SIGHUP, by the end of the launcher that started
this process, or by a file in the run's folder. A request may reach only one rank. It is therefore
all-reduced, with the token counts of the next step or between two batches of an evaluation, and all
ranks stop at the same place.

Use SIGUSR1 or the file for runs under the DeepSpeed launcher: on the other signals it kills its
ranks after 30 s, even in the middle of a step or a checkpoint. Closing a terminal sends SIGHUP; a
process that was started to ignore it, for example by nohup, continues.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from mot_megatron.job.outputs import redirect_to_null
from mot_megatron.job.processes import Process

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_OUTPUTS = (1, 2)
"""File descriptors of standard output and standard error."""
_POLL_SECONDS = 0.5


class Stopped(Exception):  # noqa: N818  # not an error
    """All ranks agreed to stop, outside of a training step."""


def never() -> None:
    """Check for a stop request where there is none."""


class StopRequest:
    """Whether this process was asked to stop, and why.

    Its signal handlers are installed for the duration of a ``with`` block.
    """

    def __init__(self, launchers: Sequence[Process] = ()) -> None:
        """Create a request that also is one when any of the ``launchers`` has ended."""
        self.reason: str | None = None
        """Why this process was asked to stop; None if it was not, as far as was looked."""
        self.launcher_ended = False
        """Whether the end of a launcher is the reason."""
        self._launchers = launchers
        self._file: Path | None = None
        self._next_look = 0.0
        self._previous: dict[int, object] = {}
        self._terminals: list[int] = []

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop; looks for more than signals twice a second."""
        now = time.monotonic()
        if self.reason is None and now >= self._next_look:
            self._next_look = now + _POLL_SECONDS
            self.reason = self._look()
        return self.reason is not None

    def watch_file(self, path: Path) -> None:
        """Take the existence of ``path`` for a request, from now on."""
        self._file = path
        self._next_look = 0.0

    def __enter__(self) -> StopRequest:
        self._terminals = [output for output in _OUTPUTS if os.isatty(output)]
        for number in _SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _look(self) -> str | None:
        for launcher in self._launchers:
            if launcher.is_dead:
                self.launcher_ended = True
                return f"the launcher, pid {launcher.pid}, has ended"
        if self._file is not None and self._file.exists():
            return f"{self._file} exists"
        return None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.reason = self.reason or f"signal {signal.Signals(number).name}"
        if number == signal.SIGHUP:
            for output in self._terminals:
                if not os.isatty(output):
                    redirect_to_null(output)
