"""Heartbeat timeouts: which ranks have not sent a heartbeat for too long."""

from __future__ import annotations

import time
from collections.abc import Callable

LONGEST_TICK_SECONDS = 5.0
"""A longer gap between two checks means that this process was itself paused."""


class HeartbeatMonitor:
    """Detects ranks whose heartbeats have stopped.

    Time during which this process was itself paused (a suspended job, a migrated virtual machine)
    does not count against other ranks: after a pause, every rank gets the full timeout again.
    """

    def __init__(self, limit_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit_seconds = limit_seconds
        self._clock = clock
        self._last_heard: dict[int, float] = {}
        self._last_check = clock()

    def heard(self, rank: int) -> None:
        """Record a heartbeat, or any other message, from a rank."""
        self._last_heard[rank] = self._clock()

    def silence(self, rank: int) -> float:
        """Return the seconds since the last message from a rank."""
        return self._clock() - self._last_heard[rank]

    def forget(self, rank: int) -> None:
        """Stop monitoring a rank."""
        self._last_heard.pop(rank, None)

    def expired(self) -> list[int]:
        """Return the ranks whose timeout has expired, in ascending order.

        Call this several times a second, since a long gap between calls counts as a pause.
        """
        now = self._clock()
        paused, self._last_check = now - self._last_check > LONGEST_TICK_SECONDS, now
        if paused:
            self._last_heard = dict.fromkeys(self._last_heard, now)
        return sorted(
            rank for rank, then in self._last_heard.items() if now - then > self.limit_seconds
        )
