"""The meeting point of the ranks' watch threads, in a thread of rank 0.

Every rank keeps one connection to it. The kernel closes the connection of a process that ends in
whatever way, so a death is known at once; a process that stops without ending is known by the
beats that fail to come. The first of these, or of the failures that ranks report, becomes the
verdict, which goes to every rank.
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

from mot_megatron.job.progress_report import Phase, ProgressReport
from mot_megatron.job.silence import Silence
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

BEAT_SECONDS = 2.0
"""Between two signs of life."""
SILENCE_SECONDS = 30.0
"""Without a sign of life until a process counts as hung. The beats come from a thread of their own,
however long a step takes; only a stopped process, or one that holds Python's lock, sends none."""
JOIN_SECONDS = 600.0
"""For all ranks to start: nodes come up, and import over the network, at different speeds."""

_TICK_SECONDS = 0.5
_DEFECT_SECONDS = 1.0
"""From a reported defect to the verdict: it may be the echo of a death that is not known yet."""
_MENDABLE_SECONDS = 5.0
"""From a UserError to the verdict: most likely rank 0 reports the same."""
_FAREWELL_SECONDS = 3.0
"""For the ranks to hear the verdict and go."""
_LATECOMER_SECONDS = 30.0
"""For ranks that were still starting to come and hear it."""
_LOOPBACK = ("localhost", "127.0.0.1")


@dataclass
class _Client:
    """One rank's connection."""

    connection: socket.socket
    lines: Lines = field(default_factory=Lines)
    peer: Peer | None = None
    """None until it has said who it is."""
    phase: Phase = field(default_factory=lambda: ProgressReport().now)
    failure: Failure | None = None


class WatchHub:
    """Accepts the ranks, passes judgement, tells everybody."""

    def __init__(
        self, address: str, world_size: int, peer: Peer, progress_report: ProgressReport
    ) -> None:
        """Open the meeting point.

        Args:
            address: What the others call this machine.
            world_size: Ranks to come.
            peer: This process.
            progress_report: This process's progress report.
        """
        # On every interface, as torch's own store: the name may resolve differently here.
        bound = address if address in _LOOPBACK else ""
        self._listener = socket.create_server((bound, 0), backlog=1024)
        self.port: int = self._listener.getsockname()[1]
        self.token = secrets.token_hex(16)
        """Keeps strangers out that happen to connect."""
        self._world_size = world_size
        self._peer = peer
        self._progress_report = progress_report
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._clients: dict[int, _Client] = {}
        """By rank, those that are there."""
        self._joined: set[int] = set()
        self._silence = Silence(SILENCE_SECONDS)
        self._started = self._last_beat = time.monotonic()
        self._first_failure: tuple[float, int] | None = None
        """When, and whose."""
        self._verdict: Verdict | None = None
        self._judged = 0.0
        self._others_left = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch hub", daemon=True)
        self._thread.start()

    def wait_for_others(self) -> None:
        """Return when every other rank has said goodbye."""
        self._others_left.wait()

    def wait_until_heard(self) -> None:
        """Return when every rank has heard the verdict and gone, or had the time to."""
        self._thread.join()

    def _run(self) -> None:
        while not self._finished():
            for key, _ in self._selector.select(_TICK_SECONDS):
                if key.data is None:
                    self._accept()
                else:
                    self._read(key.data)
            self._look_around()
        self._selector.close()
        self._listener.close()

    def _finished(self) -> bool:
        all_came = len(self._joined) == self._world_size
        # Rank 0 waits for the hub, so it cannot be the last to go once there is a verdict.
        if all_came and set(self._clients) <= ({0} if self._verdict else set()):
            return True
        limit = _FAREWELL_SECONDS if all_came else _LATECOMER_SECONDS
        return self._verdict is not None and time.monotonic() - self._judged > limit

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        connection.settimeout(1.0)  # tiny messages: only a stopped reader lets them pile up
        self._selector.register(connection, selectors.EVENT_READ, _Client(connection))

    def _read(self, client: _Client) -> None:
        try:
            received = client.connection.recv(1 << 16)
            messages = client.lines.feed(received)
        except (OSError, ValueError):
            received, messages = b"", []
        for message in messages:
            if not self._take(client, message):
                received = b""
        if not received:
            self._drop(client)

    def _take(self, client: _Client, message: dict[str, Any]) -> bool:
        """Act on a message; False ends the connection."""
        if client.peer is None:
            return self._greet(client, message)
        rank = client.peer.rank
        self._silence.heard(rank)
        if message["kind"] == "goodbye":
            self._clients.pop(rank)
            self._silence.forget(rank)
            return False
        client.phase = Phase(*message["phase"])
        if message["kind"] == "failed" and client.failure is None:
            client.failure = Failure(**message["failure"])
            self._first_failure = self._first_failure or (time.monotonic(), rank)
        return True

    def _greet(self, client: _Client, message: dict[str, Any]) -> bool:
        if message.get("token") != self.token:
            return False
        client.peer = peer = Peer(**message["peer"])
        self._clients[peer.rank] = client
        self._joined.add(peer.rank)
        self._silence.heard(peer.rank)
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
            self._silence.forget(peer.rank)
            self._judge(lost(peer, self._phase_of(client), reporter=0))

    def _look_around(self) -> None:
        now = time.monotonic()
        if now - self._last_beat >= BEAT_SECONDS:
            self._last_beat = now
            self._send_all(encode("beat", phase=self._progress_report.now))
        if len(self._joined) == self._world_size and set(self._clients) <= {0}:
            self._others_left.set()
        silent = self._silence.expired()
        if self._verdict:
            return
        missing = sorted(set(range(self._world_size)) - self._joined)
        if silent:
            client = self._clients[silent[0]]
            assert client.peer is not None
            phase = self._phase_of(client)
            self._judge(hung(client.peer, phase, SILENCE_SECONDS, reporter=0))
        elif self._first_failure:
            self._weigh_failures(now, *self._first_failure)
        elif missing and now - self._started > JOIN_SECONDS:
            self._judge(absent(missing, self._world_size, JOIN_SECONDS))

    def _weigh_failures(self, now: float, since: float, rank: int) -> None:
        first = self._clients[rank].failure
        assert first is not None
        own = self._clients.get(0)
        if first.mendable and own and own.failure and own.failure.mendable:
            rank, patience = 0, 0.0
        else:
            patience = _MENDABLE_SECONDS if first.mendable else _DEFECT_SECONDS
        if now - since >= patience:
            client = self._clients[rank]
            assert client.peer is not None
            assert client.failure is not None
            self._judge(failed(client.peer, client.failure, str(client.phase)))

    def _phase_of(self, client: _Client) -> str:
        """Where a rank got lost: what it said last, or what rank 0 has reached waiting for it."""
        return str(max(client.phase, self._progress_report.now, key=lambda phase: phase.order))

    def _judge(self, verdict: Verdict) -> None:
        if self._verdict is None:
            self._verdict = verdict
            self._judged = time.monotonic()
            self._send_all(encode_verdict(verdict))

    def _send_all(self, message: bytes) -> None:
        for client in self._clients.values():
            self._send(client, message)

    def _send(self, client: _Client, message: bytes) -> None:
        # Who cannot be reached is noticed by reading.
        with contextlib.suppress(OSError):
            client.connection.sendall(message)
