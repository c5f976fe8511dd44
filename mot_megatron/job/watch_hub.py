"""The hub of the watchdogs, a thread on rank 0 that decides when and why the job ends.

Every rank keeps a connection to it. However a process ends, the kernel closes its connection, so
the hub detects a death immediately. It detects a stopped process by missing heartbeats. The first
of these events, or of the failures that ranks report, becomes the verdict, which is sent to every
rank.
"""

from __future__ import annotations

import contextlib
import secrets
import selectors
import socket
import threading
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from mot_megatron.job.heartbeats import HeartbeatMonitor
from mot_megatron.job.progress_report import Phase, ProgressReport
from mot_megatron.job.verdict import (
    Failure,
    Lines,
    Peer,
    Verdict,
    absent,
    encode,
    encode_verdict,
    failed,
    hung,
    lost,
)

HEARTBEAT_INTERVAL_SECONDS = 2.0
"""Interval between heartbeats."""
HEARTBEAT_TIMEOUT_SECONDS = 30.0
"""Heartbeat timeout, after which a process counts as hung. Heartbeats come from a separate thread,
so a long step does not delay them; only a stopped process, or one that holds Python's global
interpreter lock, sends none."""
JOIN_TIMEOUT_SECONDS = 600.0
"""How long to wait for all ranks to join. Nodes start, and import packages over the network, at
different speeds."""

_TICK_SECONDS = 0.5
_DEFECT_SECONDS = 1.0
"""Delay from a reported exception to the verdict, because the exception may be a consequence of a
death that the hub has not detected yet."""
_USER_ERROR_SECONDS = 5.0
"""Delay from a reported UserError to the verdict, because rank 0 probably reports it too."""
_FAREWELL_SECONDS = 3.0
"""How long to wait, after the verdict, for the ranks to receive it and exit."""
_LATECOMER_SECONDS = 30.0
"""The same, if there are ranks that have not joined yet: they need time to start."""
_LOOPBACK = ("localhost", "127.0.0.1")


@dataclass
class _Client:
    """The connection of one rank, and what the hub knows about the rank."""

    connection: socket.socket
    lines: Lines = field(default_factory=Lines)
    peer: Peer | None = None
    """None until the rank has identified itself."""
    phase: Phase = field(default_factory=lambda: ProgressReport().now)
    failure: Failure | None = None


class WatchHub:
    """Monitors the connections of all ranks and sends the verdict to every rank."""

    def __init__(
        self, address: str, world_size: int, peer: Peer, progress_report: ProgressReport
    ) -> None:
        """Listen on a free port and start the hub's thread.

        Args:
            address: Host name or address of this node, as other ranks use it.
            world_size: Number of ranks that will join, this one included.
            peer: This process.
            progress_report: Of this process.
        """
        # Bind every interface, as torch's store does: the name may resolve differently here.
        bound = address if address in _LOOPBACK else ""
        self._listener = socket.create_server((bound, 0), backlog=1024)
        self.port: int = self._listener.getsockname()[1]
        self.token = secrets.token_hex(16)
        """Secret that a connection must present to be accepted."""
        self._world_size = world_size
        self._peer = peer
        self._progress_report = progress_report
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._clients: dict[int, _Client] = {}
        """Connections of the ranks that have joined and not left, by rank."""
        self._joined: set[int] = set()
        self._monitor = HeartbeatMonitor(HEARTBEAT_TIMEOUT_SECONDS)
        self._started = self._last_beat = time.monotonic()
        self._first_failure: tuple[float, int] | None = None
        """Time and rank of the first reported failure."""
        self._verdict: Verdict | None = None
        self._issued_at = 0.0
        self._others_left = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch hub", daemon=True)
        self._thread.start()

    def wait_for_others(self) -> None:
        """Wait until every other rank has left its watch normally."""
        self._others_left.wait()

    def wait_until_heard(self) -> None:
        """Wait until every rank has received the verdict and exited, or the time for it is up."""
        self._thread.join()

    def _run(self) -> None:
        while not self._finished():
            for key, _ in self._selector.select(_TICK_SECONDS):
                if key.data is None:
                    self._accept()
                else:
                    self._read(key.data)
            self._check()
        self._selector.close()
        self._listener.close()

    def _finished(self) -> bool:
        all_came = len(self._joined) == self._world_size
        # After a verdict rank 0 waits for the hub, so the hub must not wait for rank 0.
        if all_came and set(self._clients) <= ({0} if self._verdict else set()):
            return True
        limit = _FAREWELL_SECONDS if all_came else _LATECOMER_SECONDS
        return self._verdict is not None and time.monotonic() - self._issued_at > limit

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        connection.settimeout(1.0)  # messages are tiny: only a stopped reader blocks a send
        self._selector.register(connection, selectors.EVENT_READ, _Client(connection))

    def _read(self, client: _Client) -> None:
        try:
            received = client.connection.recv(1 << 16)
            messages = client.lines.feed(received)
        except (OSError, ValueError):
            received, messages = b"", []
        for message in messages:
            if not self._handle(client, message):
                received = b""
        if not received:
            self._drop(client)

    def _handle(self, client: _Client, message: dict[str, Any]) -> bool:
        """Handle a message; return False to close the connection."""
        if client.peer is None:
            return self._admit(client, message)
        rank = client.peer.rank
        self._monitor.heard(rank)
        if message["kind"] == "goodbye":
            self._clients.pop(rank)
            self._monitor.forget(rank)
            return False
        client.phase = Phase(*message["phase"])
        if message["kind"] == "failed" and client.failure is None:
            client.failure = Failure(**message["failure"])
            self._first_failure = self._first_failure or (time.monotonic(), rank)
        return True

    def _admit(self, client: _Client, message: dict[str, Any]) -> bool:
        if message.get("token") != self.token:
            return False
        client.peer = peer = Peer(**message["peer"])
        self._clients[peer.rank] = client
        self._joined.add(peer.rank)
        self._monitor.heard(peer.rank)
        self._send(client, encode("welcome", peer=asdict(self._peer)))
        if self._verdict:
            self._send(client, encode_verdict(self._verdict))
        return True

    def _drop(self, client: _Client) -> None:
        self._selector.unregister(client.connection)
        client.connection.close()
        peer = client.peer
        if peer and self._clients.get(peer.rank) is client:
            del self._clients[peer.rank]
            self._monitor.forget(peer.rank)
            self._issue(lost(peer, self._phase_of(client), reporter=0))

    def _check(self) -> None:
        now = time.monotonic()
        if now - self._last_beat >= HEARTBEAT_INTERVAL_SECONDS:
            self._last_beat = now
            self._send_all(encode("beat", phase=self._progress_report.now))
        if len(self._joined) == self._world_size and set(self._clients) <= {0}:
            self._others_left.set()
        silent = self._monitor.expired()
        if self._verdict:
            return
        missing = sorted(set(range(self._world_size)) - self._joined)
        if silent:
            client = self._clients[silent[0]]
            assert client.peer is not None
            phase = self._phase_of(client)
            self._issue(hung(client.peer, phase, HEARTBEAT_TIMEOUT_SECONDS, reporter=0))
        elif self._first_failure:
            self._decide_on_failures(now, *self._first_failure)
        elif missing and now - self._started > JOIN_TIMEOUT_SECONDS:
            self._issue(absent(missing, self._world_size, JOIN_TIMEOUT_SECONDS))

    def _decide_on_failures(self, now: float, since: float, rank: int) -> None:
        first = self._clients[rank].failure
        assert first is not None
        own = self._clients.get(0)
        if first.is_user_error and own and own.failure and own.failure.is_user_error:
            rank, delay = 0, 0.0
        else:
            delay = _USER_ERROR_SECONDS if first.is_user_error else _DEFECT_SECONDS
        if now - since >= delay:
            client = self._clients[rank]
            assert client.peer is not None
            assert client.failure is not None
            self._issue(failed(client.peer, client.failure, str(client.phase)))

    def _phase_of(self, client: _Client) -> str:
        """Return the phase in which a rank was lost.

        This is its last reported phase, or rank 0's current one if that is further ahead.
        """
        return str(max(client.phase, self._progress_report.now, key=lambda phase: phase.order))

    def _issue(self, verdict: Verdict) -> None:
        if self._verdict is None:
            self._verdict = verdict
            self._issued_at = time.monotonic()
            self._send_all(encode_verdict(verdict))

    def _send_all(self, message: bytes) -> None:
        for client in self._clients.values():
            self._send(client, message)

    def _send(self, client: _Client, message: bytes) -> None:
        # The next read detects a lost rank.
        with contextlib.suppress(OSError):
            client.connection.sendall(message)
