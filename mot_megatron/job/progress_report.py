"""Where this rank is in its work, written by the work and read by the thread that reports."""

from __future__ import annotations

from typing import NamedTuple


class Phase(NamedTuple):
    """One stretch of work; compares by how far the run has come, as all ranks do the same."""

    order: int
    """Phases begun before this one since the start of the process."""
    name: str
    """Such as "data" or "checkpoint"."""
    step: int | None
    """Training step it belongs to, from 1; None before the first."""

    def __str__(self) -> str:
        return self.name if self.step is None else f"step {self.step}, {self.name}"


class ProgressReport:
    """The phase this rank is in. Reading it from another thread needs no lock."""

    def __init__(self) -> None:
        self.now = Phase(0, "start", None)

    def enter(self, name: str, step: int | None = None) -> None:
        """Begin a phase; without ``step``, one of the same step."""
        self.now = Phase(self.now.order + 1, name, self.now.step if step is None else step)
