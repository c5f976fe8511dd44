"""Verdicts, which say why a job ends, and the messages that watchdog threads exchange."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

USER_ERROR_STATUS = 2
"""Exit status of every rank after an error that the user can fix: a UserError or absent ranks."""
DEFECT_STATUS = 1
"""Exit status of every rank after any other exception."""
LOST_STATUS = 3
"""Exit status of every rank after one died or stopped answering."""


@dataclass(frozen=True)
class Peer:
    """The process of a rank, on its host."""

    rank: int
    host: str
    pid: int
    started: str
    """Start time of the process in clock ticks since boot. It guards against a reused pid; empty if
    unknown."""

    @classmethod
    def of_this_process(cls, rank: int) -> Peer:
        """Describe this process as ``rank``."""
        return cls(rank, socket.gethostname(), os.getpid(), _start_of(os.getpid()))

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"

    def kill_if_here(self) -> None:
        """Kill the process if it runs on this host, since a stopped process does not exit."""
        if self.host == socket.gethostname() and _start_of(self.pid) == self.started:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(self.pid, signal.SIGKILL)


@dataclass(frozen=True)
class Verdict:
    """Why the job ends, which rank reports it, and the exit status."""

    message: str
    """Error message of one line."""
    reporter: int
    """The one rank that prints the message."""
    status: int
    """Exit status of every rank."""
    hung: Peer | None = None
    """A process that stopped answering and must be killed; None if there is none."""

    @classmethod
    def decode(cls, fields: dict[str, Any]) -> Verdict:
        """Rebuild a verdict from the output of ``asdict``."""
        hung = fields.pop("hung")
        return cls(**fields, hung=Peer(**hung) if hung else None)


@dataclass(frozen=True)
class Failure:
    """An exception that left the main code of a rank."""

    summary: str
    """The exception in one line."""
    is_user_error: bool
    """Whether it is a UserError."""


def lost(peer: Peer, phase: str, reporter: int) -> Verdict:
    """Return the verdict on a process that ended without reporting a reason."""
    return Verdict(f"{peer} died during {phase}", reporter, LOST_STATUS)


def hung(peer: Peer, phase: str, seconds: float, reporter: int) -> Verdict:
    """Return the verdict on a process or host without a heartbeat for ``seconds``."""
    message = f"{peer} stopped answering during {phase}: no heartbeat for {seconds:.0f} s"
    return Verdict(message, reporter, LOST_STATUS, hung=peer)


def failed(peer: Peer, failure: Failure, phase: str) -> Verdict:
    """Return the verdict on an exception; the rank that raised it reports it, with traceback."""
    if failure.is_user_error:
        message = failure.summary if peer.rank == 0 else f"{peer}: {failure.summary}"
        return Verdict(message, peer.rank, USER_ERROR_STATUS)
    message = f"{peer} failed during {phase}: {failure.summary}"
    return Verdict(message, peer.rank, DEFECT_STATUS)


def absent(ranks: list[int], world_size: int, seconds: float) -> Verdict:
    """Return the verdict on ranks that did not join in time."""
    names = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    message = (
        f"{len(ranks)} of {world_size} ranks ({names}) have not started within {seconds:.0f} s;"
        " check the logs of their nodes"
    )
    return Verdict(message, 0, USER_ERROR_STATUS)


def encode(kind: str, **fields: object) -> bytes:
    """Encode a message as one line of JSON."""
    return json.dumps({"kind": kind, **fields}).encode() + b"\n"


def encode_verdict(verdict: Verdict) -> bytes:
    """Encode the message that makes every rank exit."""
    return encode("verdict", verdict=asdict(verdict))


class Lines:
    """Splits the byte stream of a socket into messages."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, received: bytes) -> list[dict[str, Any]]:
        """Return the messages that ``received`` completes.

        Raises:
            ValueError: A line is not a message, so the peer is not a watchdog.
        """
        *whole, self._rest = (self._rest + received).split(b"\n")
        messages = [json.loads(line) for line in whole]
        if not all(isinstance(message, dict) for message in messages):
            raise ValueError("not a message")
        return messages


def _start_of(pid: int) -> str:
    """Return field 22 of /proc/PID/stat, or an empty string if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    # The second field, the command in parentheses, may itself contain spaces and parentheses.
    return stat.rpartition(")")[2].split()[19]
