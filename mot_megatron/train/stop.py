"""Ctrl-C, SIGTERM and SIGUSR1 as a request: finish the step, save, leave.

A signal may reach one rank only, so the request travels with the step's counts and all ranks stop
after the same step. SIGUSR1 is for runs under a launcher: DeepSpeed's answers the others by killing
its ranks after 30 s, however long their step and their checkpoint take.
"""

from __future__ import annotations

import signal
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether this process was asked to stop; installed for the length of a ``with`` block."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.requested = True
