"""Exclusive use of a run's folder, so that no two jobs train the same run.

The folder holds a file that names its owner: host, process and the processes of all ranks. The
owner rewrites it every few seconds, with a counter. An owner on this host is judged by its process,
an owner on another host by the counter, watched for a while on this host's own clock, so that
clocks may differ. Only the file system's atomic creation and renaming are needed.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mot_megatron.errors import CheckpointError
from mot_megatron.files import write_atomically
from mot_megatron.job.processes import Process

LOCK_FILE = "running.json"
BEAT_SECONDS = 10.0
"""Interval at which the owner rewrites the file."""
LEASE_SECONDS = 60.0
"""An owner on another host whose file does not change for this long has ended."""
_POLL_SECONDS = 1.0


@dataclass(frozen=True)
class _Owner:
    process: Process
    since: str
    """Local time at which the owner began."""

    def __str__(self) -> str:
        return f"host {self.process.host}, pid {self.process.pid}, since {self.since}"


class RunLock:
    """The lock of one run's folder. ``acquire`` and ``release`` run on one rank."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / LOCK_FILE
        self._token = secrets.token_hex(8)
        self._content = {
            "token": self._token,
            "owner": asdict(Process.of(os.getpid())),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "beat": 0,
        }
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self.taken_by: str | None = None
        """Who took the folder over while this process was suspended; None if nobody did."""

    def acquire(self, say: Callable[[str], None]) -> None:
        """Take the lock, from an owner that has ended if there is one.

        Args:
            say: Prints a line while this waits for a sign of life from another host.

        Raises:
            CheckpointError: The run is running already.
            OSError: The file cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while not self._create():
            found = self._read()
            if found is not None:
                self._judge(found, say)
                self._remove(found)
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._thread.start()

    def name_ranks(self, ranks: Sequence[Process]) -> None:
        """Add the processes of all ranks to the file, for people and tools that end them."""
        self._content["ranks"] = [asdict(rank) for rank in ranks]

    def confirm(self) -> None:
        """Make sure that no other job has taken the folder over, by reading the file once more.

        Raises:
            CheckpointError: Another job has.
        """
        found = self._read()
        if found is not None and not self._is_mine():
            self.taken_by = str(_owner_of(found) or "another job")
        if self.taken_by:
            raise CheckpointError(
                f"{self.path.parent}: another job ({self.taken_by}) took over this folder while"
                " this job was suspended; this job ends without saving"
            )

    def release(self) -> None:
        """Give the lock back; a folder that holds nothing else is removed."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        with contextlib.suppress(OSError):
            if self._is_mine():
                self.path.unlink()
            self.path.parent.rmdir()

    def _create(self) -> bool:
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w") as file:
            file.write(json.dumps(self._content))
        return True

    def _read(self) -> bytes | None:
        with contextlib.suppress(FileNotFoundError):
            return self.path.read_bytes()
        return None

    def _judge(self, found: bytes, say: Callable[[str], None]) -> None:
        """Return if the owner in ``found`` has ended; raise if it runs."""
        owner = _owner_of(found)
        if owner is not None and owner.process.is_dead:
            return
        if owner is None or not owner.process.is_here:
            who = owner or "another job"
            say(f"{self.path}: waiting up to {LEASE_SECONDS:.0f} s for a sign of life of {who}")
            deadline = time.monotonic() + LEASE_SECONDS
            while (now := self._read()) == found:
                if time.monotonic() > deadline:
                    return
                time.sleep(_POLL_SECONDS)
            if now is None:
                return
            owner = _owner_of(now)
        raise CheckpointError(
            f"{self.path.parent}: already running ({owner or 'another job'});"
            " stop that job, or give this one another run.name"
        )

    def _remove(self, found: bytes) -> None:
        """Remove the file if it still is ``found``; of several jobs that try, one succeeds."""
        aside = self.path.with_name(f"{LOCK_FILE}.{self._token}")
        try:
            self.path.rename(aside)
        except FileNotFoundError:
            return
        if aside.read_bytes() != found:
            # Somebody else has just taken it: put it back.
            with contextlib.suppress(FileExistsError):
                os.link(aside, self.path)
        aside.unlink()

    def _is_mine(self) -> bool:
        found = self._read()
        return found is not None and json.loads(found).get("token") == self._token

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            # A disk that is full or away for a moment does not end the run.
            with contextlib.suppress(OSError, ValueError, AttributeError):
                found = self._read()
                if found is not None and not self._is_mine():
                    self.taken_by = str(_owner_of(found) or "another job")
                    return
                self._content["beat"] = int(str(self._content["beat"])) + 1
                write_atomically(self.path, json.dumps(self._content))


def _owner_of(content: bytes) -> _Owner | None:
    """Return the owner that a lock file names; None if it is incomplete or damaged."""
    try:
        fields = json.loads(content)
        return _Owner(Process(**fields["owner"]), str(fields["since"]))
    except (ValueError, LookupError, TypeError):
        return None
