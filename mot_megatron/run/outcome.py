"""What a job leaves in its run's folder for those who start it again: its last step, its outcome.

Exit statuses alone do not tell it: the deepspeed launcher ends with status 0 if the process that it
starts on a node is killed. This module imports nothing slow, because the supervisor uses it.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from mot_megatron.files import write_atomically

STOP_FILE = "stop"
"""Creating a file of this name in the run's folder requests a stop; the run removes the file."""
STEP_FILE = "last_step"
"""File with the number of steps done, which the first rank overwrites after every step."""
OUTCOME_FILE = "outcome.json"
"""File about the end of a job that ended by itself, or because it was asked to."""

_DIGITS = 20


@dataclass(frozen=True)
class Outcome:
    """How a job ended that neither failed nor was lost."""

    kind: Literal["done", "stopped"]
    step: int
    """Steps done and saved."""
    reason: str = ""
    """Why it stopped, for people."""
    launcher_ended: bool = False
    """Whether it stopped only because its launcher had ended, without a request to stop."""


class StepFile:
    """Keeps the number of steps done in the run's folder, at the cost of one small write per step.

    The write goes to the system's cache, so it survives the death of the process. Errors are
    ignored: only the decision to start the job again needs the number.
    """

    def __init__(self, directory: Path | None) -> None:
        """Write to the run's folder ``directory``; None: write nothing, as on all other ranks."""
        self._path = directory and directory / STEP_FILE
        self._descriptor: int | None = None

    def record(self, steps: int) -> None:
        """Write the number of steps done."""
        if self._path is None:
            return
        with contextlib.suppress(OSError):
            if self._descriptor is None:
                self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o644)
            os.pwrite(self._descriptor, f"{steps:{_DIGITS}}\n".encode(), 0)

    def close(self) -> None:
        """Close the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def read_step(directory: Path) -> int | None:
    """Return the steps done by the last job in a run's folder; None before its first step."""
    try:
        return int((directory / STEP_FILE).read_text())
    except (OSError, ValueError):
        return None


def write_outcome(directory: Path, outcome: Outcome) -> None:
    """Write how the job ended; a full disk does not fail a job that has ended well."""
    with contextlib.suppress(OSError):
        write_atomically(directory / OUTCOME_FILE, json.dumps(asdict(outcome)))


def read_outcome(directory: Path) -> Outcome | None:
    """Return how the last job in a run's folder ended; None if it failed or was lost."""
    try:
        return Outcome(**json.loads((directory / OUTCOME_FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def forget_outcome(directory: Path) -> None:
    """Remove what an earlier job left."""
    for name in (STEP_FILE, OUTCOME_FILE):
        with contextlib.suppress(OSError):
            (directory / name).unlink()
