"""When a job that failed is started again, and the record of these decisions in the run's folder.

With one supervisor per node, that of the first node decides, and the others read its decisions from
the record. No clock is compared across nodes.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

RECORD_FILE = "restarts.jsonl"
"""File in the run's folder with one decision per line."""

# The name that a checkpoint has from the moment it is complete; checkpoint.find imports torch.
_CHECKPOINT = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True)
class Failure:
    """Where a job failed."""

    step: int | None
    """Steps that were done; None before the first."""
    checkpoint: int | None
    """Step of the newest checkpoint; None if there is none."""

    def __str__(self) -> str:
        place = "before the first step" if self.step is None else f"after step {self.step}"
        saved = "none" if self.checkpoint is None else f"step {self.checkpoint}"
        return f"{place}, newest checkpoint: {saved}"


@dataclass(frozen=True)
class Decision:
    """What follows the end of a job."""

    restart: bool
    status: int
    """Exit status of the supervisors, if the job is not started again."""
    reason: str
    """One sentence for people."""


class RestartPolicy:
    """Allows restarts that can be expected to help."""

    def __init__(
        self,
        most: int,
        within_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Allow at most ``most`` restarts within any ``within_seconds``."""
        self.most = most
        self.within_seconds = within_seconds
        self._clock = clock
        self._times: list[float] = []
        self._failures: set[Failure] = set()

    def object_to(self, failure: Failure) -> str | None:
        """Return why the job is not started again after a failure; None counts a restart."""
        if failure in self._failures:
            return f"it failed there before ({failure}), and no checkpoint was written since"
        now = self._clock()
        self._times = [then for then in self._times if now - then < self.within_seconds]
        if len(self._times) >= self.most:
            return (
                f"it was started again {len(self._times)} times within"
                f" {self.within_seconds / 60:.0f} minutes already, the most that is allowed"
            )
        self._failures.add(failure)
        self._times.append(now)
        return None

    @property
    def used(self) -> int:
        """Restarts in the current window."""
        return len(self._times)


def newest_checkpoint(run_directory: Path) -> int | None:
    """Return the step of the newest complete checkpoint; its files are not verified."""
    try:
        names = os.listdir(run_directory / "checkpoints")  # noqa: PTH208  # names are all we need
    except OSError:
        return None
    steps = [int(match[1]) for name in names if (match := _CHECKPOINT.fullmatch(name))]
    return max(steps, default=None)


class Record:
    """The decisions about one run."""

    def __init__(self, run_directory: Path) -> None:
        self._path = run_directory / RECORD_FILE

    def __len__(self) -> int:
        return len(self._lines())

    def add(self, decision: Decision) -> None:
        """Append a decision.

        Raises:
            OSError: The file cannot be written.
        """
        line = json.dumps({"time": time.strftime("%Y-%m-%d %H:%M:%S"), **asdict(decision)})
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as stream:
            # One write: a reader on another node sees the whole line or none of it.
            stream.write(f"{line}\n".encode())
            stream.flush()
            os.fsync(stream.fileno())

    def after(self, count: int) -> Decision | None:
        """Return the decision that follows the first ``count``; None if there is none yet."""
        lines = self._lines()
        if len(lines) <= count:
            return None
        fields = json.loads(lines[count])
        return Decision(fields["restart"], fields["status"], fields["reason"])

    def _lines(self) -> list[bytes]:
        try:
            return self._path.read_bytes().split(b"\n")[:-1]
        except OSError:
            return []
