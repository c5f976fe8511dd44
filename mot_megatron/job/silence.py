"""Who has not been heard for too long."""

from __future__ import annotations

import time
from collections.abc import Callable

LONGEST_TICK_SECONDS = 5.0


class Silence:
    """Notices peers that were not heard for a while.

    Time in which this process itself was paused (a job suspended and resumed, a migrated virtual
    machine) says nothing about the others: after it, all of them get the full time again.
    """

    def __init__(self, limit_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit_seconds = limit_seconds
        self._clock = clock
        self._heard: dict[int, float] = {}
        self._last_look = clock()

    def heard(self, rank: int) -> None:
        """Note a sign of life."""
        self._heard[rank] = self._clock()

    def forget(self, rank: int) -> None:
        """Expect nothing more from a rank."""
        self._heard.pop(rank, None)

    def expired(self) -> list[int]:
        """Ranks that were silent for too long, ascending; to be asked several times a second."""
        now = self._clock()
        paused, self._last_look = now - self._last_look > LONGEST_TICK_SECONDS, now
        if paused:
            self._heard = dict.fromkeys(self._heard, now)
        return sorted(rank for rank, then in self._heard.items() if now - then > self.limit_seconds)
