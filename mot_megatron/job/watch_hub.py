"""The hub of the watchdogs, a thread on rank 0 that decides when and why the job ends.

Every rank keeps a connection to it. However a process ends, the kernel closes its connection, so
the hub detects a death immediately. It detects a stopped process by missing heartbeats. The first
of these events, or of the failures that ranks report, becomes the verdict, which is sent to every
rank. Whatever a single connection sends can close that connection, never the hub.
"""

from __future__ import annotations

import contextlib
import resource
import selectors
import socket
import threading
import time
import traceback
from dataclasses import asdict, dataclass, field
from typing import Any

from mot_megatron.job.handshake import new_challenge, peer_of_hello, prove
from mot_megatron.job.heartbeats import HeartbeatMonitor
from mot_megatron.job.outputs import write_line
from mot_megatron.job.progress_report import Phase, ProgressReport
from mot_megatron.job.verdict import (
    DEFECT_STATUS,
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
    name_ranks,
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
_GREETING_SECONDS = 20.0
"""How long a connection may take to introduce itself."""
_MOST_STRANGERS = 256
"""Connections that have not introduced themselves; the oldest is closed for a newer one."""
_PAUSE_SECONDS = 1.0
"""How long no connection is accepted after the process ran out of file descriptors."""
_SPARE_DESCRIPTORS = 4096
_MISSING_SECONDS = 60.0
"""Interval between messages that name the ranks that have not joined yet."""
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


@dataclass(eq=False)
class _Client:
    """The connection of one rank, and what the hub knows about the rank."""

    connection: socket.socket
    challenge: str
    since: float = field(default_factory=time.monotonic)
    lines: Lines = field(default_factory=Lines)
    peer: Peer | None = None
    """None until the rank has identified itself."""
    phase: Phase = field(default_factory=lambda: ProgressReport().now)
    failure: Failure | None = None


class WatchHub:
    """Monitors the connections of all ranks and sends the verdict to every rank."""

    def __init__(
        self,
        address: str,
        world_size: int,
        key: bytes,
        peer: Peer,
        progress_report: ProgressReport,
        output: int = 2,
    ) -> None:
        """Listen on a free port and start the hub's thread.

        Args:
            address: Host name or address of this node, as other ranks use it.
            world_size: Number of ranks that will join, this one included.
            key: Secret that all ranks of this launch know.
            peer: This process.
            progress_report: Of this process.
            output: File descriptor for messages.
        """
        _allow_descriptors(world_size + _MOST_STRANGERS + _SPARE_DESCRIPTORS)
        # Bind every interface, as torch's store does: the name may resolve differently here.
        bound = address if address in _LOOPBACK else ""
        self._listener = socket.create_server((bound, 0), backlog=1024)
        self.port: int = self._listener.getsockname()[1]
        self._key = key
        self._output = output
        self._world_size = world_size
        self._peer = peer
        self._progress_report = progress_report
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._clients: dict[int, _Client] = {}
        """Connections of the ranks that have joined and not left, by rank."""
        self._strangers: dict[_Client, None] = {}
        """Connections that have not introduced themselves, the oldest first."""
        self._accept_again: float | None = None
        """When to accept connections again; None while they are accepted."""
        self._joined: set[int] = set()
        self._died_before_joining: set[int] = set()
        self._monitor = HeartbeatMonitor(HEARTBEAT_TIMEOUT_SECONDS)
        self._started = self._last_beat = self._last_told = time.monotonic()
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
        try:
            while not self._finished():
                self._turn()
        except Exception as error:  # noqa: BLE001  # a hub that ends silently would be blamed on rank 0
            write_line(self._output, traceback.format_exc())
            reason = f"{type(error).__name__}: {error}"
            message = f"{self._peer}: the hub of the watchdogs failed: {reason}"
            self._issue(Verdict(message, 0, DEFECT_STATUS))
        self._others_left.set()
        self._selector.close()
        self._listener.close()

    def _turn(self) -> None:
        for key, _ in self._selector.select(_TICK_SECONDS):
            if key.data is None:
                self._accept()
            else:
                self._read(key.data)
        self._check()

    @property
    def _all_joined(self) -> bool:
        return len(self._joined) == self._world_size

    def _finished(self) -> bool:
        nobody_is_missing = len(self._joined | self._died_before_joining) == self._world_size
        # After a verdict rank 0 waits for the hub, so the hub must not wait for rank 0.
        if nobody_is_missing and set(self._clients) <= ({0} if self._verdict else set()):
            return True
        limit = _FAREWELL_SECONDS if nobody_is_missing else _LATECOMER_SECONDS
        return self._verdict is not None and time.monotonic() - self._issued_at > limit

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            # No descriptor is free. Close a stranger, and let the backlog wait a moment.
            if self._strangers:
                self._drop(next(iter(self._strangers)))
            self._selector.unregister(self._listener)
            self._accept_again = time.monotonic() + _PAUSE_SECONDS
            return
        connection.settimeout(1.0)  # messages are tiny: only a stopped reader blocks a send
        client = _Client(connection, new_challenge())
        self._strangers[client] = None
        self._selector.register(connection, selectors.EVENT_READ, client)
        self._send(client, encode("challenge", challenge=client.challenge))
        if len(self._strangers) > _MOST_STRANGERS:
            self._drop(next(iter(self._strangers)))

    def _read(self, client: _Client) -> None:
        if client.connection.fileno() < 0:
            return  # closed since select returned
        try:
            received = client.connection.recv(1 << 16)
            keep = bool(received)
            for message in client.lines.feed(received):
                keep = keep and self._handle(client, message)
        # Whatever a peer sends: only its own connection ends.
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            keep = False
        if not keep:
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
        elif message["kind"] == "dead before joining":
            dead = Peer(**message["peer"])
            if dead.rank not in self._joined:
                self._died_before_joining.add(dead.rank)
                self._issue(lost(dead, "start", reporter=0))
        return True

    def _admit(self, client: _Client, message: dict[str, Any]) -> bool:
        peer = peer_of_hello(message, self._key, client.challenge)
        if peer is None:
            self._send(client, encode("refused", reason="it belongs to another job"))
            return False
        if not 0 <= peer.rank < self._world_size or peer.rank in self._joined:
            there = self._clients.get(peer.rank)
            reason = f"{there.peer} is there already" if there else "this rank has left already"
            self._send(client, encode("refused", reason=reason))
            return False
        client.peer = peer
        del self._strangers[client]
        self._clients[peer.rank] = client
        self._joined.add(peer.rank)
        self._monitor.heard(peer.rank)
        proof = prove(self._key, "hub", client.challenge, message["challenge"])
        self._send(client, encode("welcome", peer=asdict(self._peer), proof=proof))
        if self._verdict:
            self._send(client, encode_verdict(self._verdict))
        return True

    def _drop(self, client: _Client) -> None:
        self._strangers.pop(client, None)
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
            phase = self._progress_report.now
            self._send_all(encode("beat", phase=phase, all_joined=self._all_joined))
        if self._all_joined and set(self._clients) <= {0}:
            self._others_left.set()
        self._tend_strangers(now)
        silent = self._monitor.expired()
        if self._verdict:
            return
        missing = sorted(set(range(self._world_size)) - self._joined)
        if missing and now - self._last_told > _MISSING_SECONDS:
            self._last_told = now
            waited = f"after {now - self._started:.0f} s"
            write_line(
                self._output, f"waiting for {name_ranks(missing, self._world_size)} {waited}"
            )
        if silent:
            client = self._clients[silent[0]]
            assert client.peer is not None
            phase = self._phase_of(client)
            self._issue(hung(client.peer, phase, HEARTBEAT_TIMEOUT_SECONDS, reporter=0))
        elif self._first_failure:
            self._decide_on_failures(now, *self._first_failure)
        elif missing and now - self._started > JOIN_TIMEOUT_SECONDS:
            self._issue(absent(missing, self._world_size, JOIN_TIMEOUT_SECONDS))

    def _tend_strangers(self, now: float) -> None:
        for client in list(self._strangers):
            if now - client.since > _GREETING_SECONDS:
                self._drop(client)
        if self._accept_again is not None and now >= self._accept_again:
            self._accept_again = None
            self._selector.register(self._listener, selectors.EVENT_READ)

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


def _allow_descriptors(number: int) -> None:
    """Raise this process's limit of open files to ``number``, as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = number if hard == resource.RLIM_INFINITY else min(number, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
