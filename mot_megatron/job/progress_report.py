"""The current phase of this rank, set by the main thread and read by the watchdog thread."""

from __future__ import annotations

from typing import NamedTuple


class Phase(NamedTuple):
    """One phase of the work of a rank.

    All ranks go through the same phases, so ``order`` shows which of two ranks is further ahead.
    """

    order: int
    """Number of phases before this one since the process started."""
    name: str
    """Name of the phase, for example "data" or "checkpoint"."""
    step: int | None
    """Training step that it belongs to, counted from 1; None before the first step."""

    def __str__(self) -> str:
        return self.name if self.step is None else f"step {self.step}, {self.name}"


class ProgressReport:
    """The current phase of this rank. Other threads may read it without a lock."""

    def __init__(self) -> None:
        self.now = Phase(0, "start", None)

    def enter(self, name: str, step: int | None = None) -> None:
        """Start a phase; without ``step``, it belongs to the current step."""
        self.now = Phase(self.now.order + 1, name, self.now.step if step is None else step)
