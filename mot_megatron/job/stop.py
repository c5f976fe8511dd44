"""Ctrl-C, SIGTERM, SIGUSR1 and a closed terminal as a request: finish the step, save, leave.

A signal may reach one rank only, so the request travels with the step's counts and all ranks stop
after the same step. SIGUSR1 is for runs under a launcher: DeepSpeed's answers the others by killing
its ranks after 30 s, however long their step and their checkpoint take. A terminal that closes
sends SIGHUP; a process that was started to ignore it, as by nohup, goes on.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_OUTPUTS = (1, 2)
"""Descriptors of the standard output and of errors."""


class StopRequest:
    """Whether this process was asked to stop; installed for the length of a ``with`` block."""

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
            self._forget_terminals_gone()

    def _forget_terminals_gone(self) -> None:
        """Write into nothing in their place: the first line to one would end the work unsaved."""
        for output in self._terminals:
            if not os.isatty(output):
                nothing = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nothing, output)
                os.close(nothing)
