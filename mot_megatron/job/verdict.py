"""Verdicts, which say why a job ends, and the messages that watchdog threads exchange."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, dataclass
from typing import Any

from mot_megatron.errors import UserError
from mot_megatron.job.outputs import write_line
from mot_megatron.job.processes import Process, start_of

USER_ERROR_STATUS = 2
"""Exit status of every rank after an error that the user can fix: a UserError or absent ranks."""
DEFECT_STATUS = 1
"""Exit status of every rank after any other exception."""
LOST_STATUS = 3
"""Exit status of every rank after one died or stopped answering."""
LONGEST_LINE = 1 << 16
"""Longest message in bytes; the longest that ranks send is the summary of an exception."""


@dataclass(frozen=True)
class Peer(Process):
    """The process of a rank, on its host."""

    rank: int

    @classmethod
    def of_this_process(cls, rank: int) -> Peer:
        """Describe this process as ``rank``."""
        return cls(socket.gethostname(), os.getpid(), start_of(os.getpid()), rank)

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"


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
    failed_rank: int | None = None
    """The rank whose exception is the reason, and which prints its traceback; None if there is
    none."""

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
    return Verdict(message, peer.rank, DEFECT_STATUS, failed_rank=peer.rank)


def absent(ranks: list[int], world_size: int, seconds: float) -> Verdict:
    """Return the verdict on ranks that did not join in time."""
    message = (
        f"{name_ranks(ranks, world_size)} have not started within {seconds:.0f} s;"
        " check the logs of their nodes"
    )
    return Verdict(message, 0, USER_ERROR_STATUS)


def name_ranks(ranks: list[int], world_size: int) -> str:
    """Return how many ranks these are, and name the first eight."""
    names = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"{len(ranks)} of {world_size} ranks ({names})"


def encode(kind: str, **fields: object) -> bytes:
    """Encode a message as one line of JSON."""
    return json.dumps({"kind": kind, **fields}).encode() + b"\n"


def encode_verdict(verdict: Verdict) -> bytes:
    """Encode the message that makes every rank exit."""
    return encode("verdict", verdict=asdict(verdict))


class Lines:
    """Splits the byte stream of a socket into messages, of at most ``LONGEST_LINE`` bytes."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, received: bytes) -> list[dict[str, Any]]:
        """Return the messages that ``received`` completes.

        Raises:
            ValueError: A line is too long or not a message, so the peer is not a watchdog.
        """
        *whole, self._rest = (self._rest + received).split(b"\n")
        if max(map(len, (*whole, self._rest))) > LONGEST_LINE:
            raise ValueError("line too long")
        try:
            messages = [json.loads(line) for line in whole]
        except RecursionError as error:
            raise ValueError("nested too deeply") from error
        if not all(isinstance(message, dict) for message in messages):
            raise ValueError("not a message")
        return messages


def report_user_error(error: UserError) -> int:
    """Print an error raised outside of a watchdog in one line, and return the exit status."""
    write_line(2, f"error: {error}")
    return USER_ERROR_STATUS
