"""What ended a job: the messages that the ranks' watch threads exchange about it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MENDABLE_STATUS = 2
"""Exit status of every rank after an error that the user can mend."""
DEFECT_STATUS = 1
"""... after an exception that is no UserError."""
LOST_STATUS = 3
"""... after a rank that died or stopped answering."""


@dataclass(frozen=True)
class Peer:
    """A rank as a process on a machine."""

    rank: int
    host: str
    pid: int
    started: str
    """When the process started, in the kernel's ticks: a pid alone may belong to a later one."""

    @classmethod
    def of_this_process(cls, rank: int) -> Peer:
        """The rank that this process is."""
        return cls(rank, socket.gethostname(), os.getpid(), _start_of(os.getpid()))

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"

    def kill_if_here(self) -> None:
        """End the process if it runs on this machine: a stopped one does not end by itself."""
        if self.host == socket.gethostname() and _start_of(self.pid) == self.started:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(self.pid, signal.SIGKILL)


@dataclass(frozen=True)
class Verdict:
    """Why the job ends, and who says so."""

    message: str
    """One line."""
    reporter: int
    """The only rank that prints it."""
    status: int
    """Exit status of every rank."""
    hung: Peer | None = None
    """A rank that will not end by itself."""

    @classmethod
    def decode(cls, fields: dict[str, Any]) -> Verdict:
        """From what ``asdict`` made of it."""
        hung = fields.pop("hung")
        return cls(**fields, hung=Peer(**hung) if hung else None)


@dataclass(frozen=True)
class Failure:
    """An exception that ended the work of a rank."""

    summary: str
    """Of the exception, in one line."""
    mendable: bool
    """Whether it is a UserError."""


def lost(peer: Peer, phase: str, reporter: int) -> Verdict:
    """A rank's process has ended without a word."""
    return Verdict(f"{peer} died during {phase}", reporter, LOST_STATUS)


def hung(peer: Peer, phase: str, seconds: float, reporter: int) -> Verdict:
    """A rank's process, or its machine, has not been heard for ``seconds``."""
    message = f"{peer} stopped answering during {phase}: silent for {seconds:.0f} s"
    return Verdict(message, reporter, LOST_STATUS, hung=peer)


def failed(peer: Peer, failure: Failure, phase: str) -> Verdict:
    """A rank raised; it reports that itself, where it has the traceback."""
    if failure.mendable:
        message = failure.summary if peer.rank == 0 else f"{peer}: {failure.summary}"
        return Verdict(message, peer.rank, MENDABLE_STATUS)
    message = f"{peer} failed during {phase}: {failure.summary}"
    return Verdict(message, peer.rank, DEFECT_STATUS)


def absent(ranks: list[int], world_size: int, seconds: float) -> Verdict:
    """Ranks that have not joined in time."""
    names = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    message = (
        f"{len(ranks)} of {world_size} ranks ({names}) have not started within {seconds:.0f} s;"
        " look at their nodes' logs"
    )
    return Verdict(message, 0, MENDABLE_STATUS)


def encode(kind: str, **fields: object) -> bytes:
    """One message: a line of JSON."""
    return json.dumps({"kind": kind, **fields}).encode() + b"\n"


def encode_verdict(verdict: Verdict) -> bytes:
    """The message that ends every rank."""
    return encode("verdict", verdict=asdict(verdict))


class Lines:
    """Cuts what a socket delivers into messages."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, received: bytes) -> list[dict[str, Any]]:
        """The messages that ``received`` completes.

        Raises:
            ValueError: a line is no message: somebody else is speaking.
        """
        *whole, self._rest = (self._rest + received).split(b"\n")
        messages = [json.loads(line) for line in whole]
        if not all(isinstance(message, dict) for message in messages):
            raise ValueError("not a message")
        return messages


def _start_of(pid: int) -> str:
    """Field 22 of /proc/PID/stat; empty for a process that does not exist."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    # The second field, the command in parentheses, may itself hold spaces and parentheses.
    return stat.rpartition(")")[2].split()[19]
