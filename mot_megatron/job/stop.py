"""Graceful stop on SIGINT, SIGTERM, SIGUSR1 or SIGHUP: finish the step, save, and exit.

A signal may reach only one rank. The request is therefore all-reduced with the token counts of the
next step, and all ranks stop after the same step. Use SIGUSR1 for runs under the DeepSpeed
launcher: on the other signals it kills its ranks after 30 s, even in the middle of a step or a
checkpoint. Closing a terminal sends SIGHUP; a process that was started to ignore it, for example by
nohup, continues.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_OUTPUTS = (1, 2)
"""File descriptors of standard output and standard error."""


class StopRequest:
    """Whether this process was asked to stop.

    Its signal handlers are installed for the duration of a ``with`` block.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, object] = {}
        self._terminals: list[int] = []

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

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.requested = True
        if number == signal.SIGHUP:
            self._redirect_closed_terminals()

    def _redirect_closed_terminals(self) -> None:
        """Redirect output to closed terminals to the null device.

        Otherwise the next line of output would raise an error before the run is saved.
        """
        for output in self._terminals:
            if not os.isatty(output):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, output)
                os.close(null)
