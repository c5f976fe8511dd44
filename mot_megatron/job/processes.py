"""Processes of this and other hosts, safe against reused process IDs."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from dataclasses import dataclass
from multiprocessing import parent_process
from pathlib import Path
from threading import Thread


@dataclass(frozen=True)
class Process:
    """A process on a host."""

    host: str
    pid: int
    started: str
    """Start time in clock ticks since boot, from /proc; empty if unknown."""

    @classmethod
    def of(cls, pid: int) -> Process:
        """Describe a process on this host."""
        return cls(socket.gethostname(), pid, start_of(pid))

    @property
    def is_here(self) -> bool:
        """Whether it ran on this host."""
        return self.host == socket.gethostname()

    @property
    def is_dead(self) -> bool:
        """Whether it ran on this host and is proven to have ended."""
        return self.is_here and start_of(self.pid) != self.started

    def kill_if_here(self) -> None:
        """Kill it if it runs on this host, since a stopped process does not exit by itself."""
        if self.is_here and not self.is_dead:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(self.pid, signal.SIGKILL)


def end_with_parent() -> None:
    """Exit this process, which multiprocessing has started, when its parent ends."""
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()


def start_of(pid: int) -> str:
    """Return field 22 of /proc/PID/stat, or an empty string if no such process runs."""
    fields = _fields_of(pid)
    return fields[19] if fields else ""


def session_of(pid: int) -> int | None:
    """Return the session of a process on this host; None if it does not run."""
    fields = _fields_of(pid)
    return int(fields[3]) if fields else None


def group_members(group: int) -> list[int]:
    """Return the running processes of a process group on this host."""
    return [
        int(folder.name)
        for folder in Path("/proc").glob("[0-9]*")
        if (fields := _fields_of(int(folder.name))) and int(fields[2]) == group
    ]


def descendants_of(pid: int) -> list[int]:
    """Return the processes that a process on this host started, and those that they started."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        child = int(folder.name)
        if fields := _fields_of(child):
            children.setdefault(int(fields[1]), []).append(child)
    found, waiting = [], [pid]
    while waiting:
        own = children.get(waiting.pop(), [])
        found += own
        waiting += own
    return sorted(found)


def _fields_of(pid: int) -> list[str]:
    """Return /proc/PID/stat from field 3 (the state) on; empty if no such process runs."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return []
    # The second field, the command in parentheses, may itself contain spaces and parentheses.
    fields = stat.rpartition(")")[2].split()
    # A zombie has ended, although its parent has not collected its status yet.
    return [] if fields[0] in ("Z", "X") else fields
