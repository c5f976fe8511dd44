"""The watchdog of a rank: end all ranks when one fails, and report the reason exactly once.

A watchdog thread on every rank sends heartbeats with the rank's current phase to the hub on rank 0
(see watch_hub) and waits for a verdict. A verdict ends the process at once, even while its main
thread is blocked in a collective. One rank prints it: the rank that raised an exception, rank 0 for
a rank that was lost, or the last rank if rank 0 was lost.
"""

from __future__ import annotations

import os
import selectors
import socket
import threading
import time
import traceback
from dataclasses import asdict
from types import TracebackType
from typing import Any, NoReturn

from mot_megatron.errors import TrainingError, UserError
from mot_megatron.job.distributed import World
from mot_megatron.job.handshake import RefusedError, introduce
from mot_megatron.job.heartbeats import HeartbeatMonitor
from mot_megatron.job.outputs import write_line
from mot_megatron.job.progress_report import Phase, ProgressReport
from mot_megatron.job.start_notes import StartNotes
from mot_megatron.job.verdict import (
    Failure,
    Lines,
    Peer,
    Verdict,
    encode,
    failed,
    hung,
    lost,
)
from mot_megatron.job.watch_hub import (
    HEARTBEAT_INTERVAL_SECONDS,
    HEARTBEAT_TIMEOUT_SECONDS,
    WatchHub,
)

_STORE_KEY = "mot_megatron/watch"
_LONGEST_SUMMARY = 4000
_CONNECT_SECONDS = 30.0
_VERDICT_SECONDS = HEARTBEAT_TIMEOUT_SECONDS + 10
"""How long a failed rank waits for a verdict. Longer than the heartbeat timeout, so that a hung hub
is detected first."""
_GOODBYE_SECONDS = 5.0
_SILENT_FRACTION = 0.7
"""A rank 0 whose connection closes after this part of the timeout without a heartbeat had hung."""


class Watchdog:
    """Monitors all ranks during a ``with`` block; does nothing in a world of one process.

    An exception that leaves the block ends the process of every rank and does not propagate. On
    normal exit, rank 0 waits until all other ranks have left the block.
    """

    def __init__(self, world: World, progress_report: ProgressReport) -> None:
        """Connect to the hub, after starting it on rank 0.

        Raises:
            TrainingError: The hub cannot be reached.
        """
        self._world = world
        self._progress_report = progress_report
        self._peer = Peer.of_this_process(world.rank)
        self._notes = StartNotes(world.host_key)
        self._all_joined = False
        self._hub: WatchHub | None = None
        self._hub_peer: Peer | None = None
        self._hub_phase = progress_report.now
        self._traceback = ""
        self._leaving = False
        self._thread: threading.Thread | None = None
        if world.size > 1:
            # Libraries redirect standard error while they compile; the reason must not be lost.
            self._output = os.dup(2)
            self._connection = self._connect()
            self._notes.remove(world.rank)
            # Both the main and the watchdog thread send; the lock keeps their messages apart.
            self._sending = threading.Lock()
            self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
            self._thread.start()

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._thread is None:
            return
        if error is not None:
            self._fail(error)
        if self._hub:
            self._hub.wait_for_others()
        self._leaving = True
        self._send("goodbye")
        self._thread.join(_GOODBYE_SECONDS)

    def _connect(self) -> socket.socket:
        world, key = self._world, self._world.key
        if world.rank == 0:
            self._hub = WatchHub(
                world.address, world.size, key, self._peer, self._progress_report, self._output
            )
            world.publish(_STORE_KEY, str(self._hub.port))
        port = int(world.look_up(_STORE_KEY))
        place = f"{world.address}, port {port}"
        try:
            connection = socket.create_connection((world.address, port), _CONNECT_SECONDS)
            self._hub_peer = introduce(connection, key, self._peer, _CONNECT_SECONDS)
        except OSError as error:
            raise TrainingError(f"rank 0 cannot be reached at {place}: {error}") from error
        except RefusedError as error:
            raise TrainingError(
                f"refused by rank 0 at {world.address}, port {world.port}: {error}; if another job"
                " uses this port, choose one with --master_port"
            ) from error
        connection.settimeout(None)
        return connection

    def _fail(self, error: BaseException) -> NoReturn:
        summary = traceback.format_exception_only(error)[-1].strip().partition("\n")[0]
        is_user_error = isinstance(error, UserError)
        if is_user_error:
            summary = str(error)
        else:
            self._traceback = "".join(traceback.format_exception(error))
        failure = Failure(summary[:_LONGEST_SUMMARY], is_user_error)
        self._send("failed", failure=asdict(failure))
        assert self._thread is not None
        self._thread.join(_VERDICT_SECONDS)
        # The thread ends the process on a verdict. If none has come, this rank reports itself.
        self._end(failed(self._peer, failure, str(self._progress_report.now)))

    def _send(self, kind: str, **fields: Any) -> None:
        message = encode(kind, phase=self._progress_report.now, **fields)
        with self._sending:
            try:
                self._connection.sendall(message)
            except OSError:
                return  # the next read detects a lost hub

    def _run(self) -> None:
        lines, monitor = Lines(), HeartbeatMonitor(HEARTBEAT_TIMEOUT_SECONDS)
        monitor.heard(0)
        next_beat = time.monotonic()
        # Not select, which fails for descriptors above 1023.
        selector = selectors.DefaultSelector()
        selector.register(self._connection, selectors.EVENT_READ)
        while True:
            now = time.monotonic()
            if now >= next_beat:
                next_beat = now + HEARTBEAT_INTERVAL_SECONDS
                self._send("beat")
                self._report_dead_before_joining()
            if selector.select(HEARTBEAT_INTERVAL_SECONDS / 4):
                received = self._receive()
                if not received:
                    break
                monitor.heard(0)
                for message in lines.feed(received):
                    self._handle(message)
            elif monitor.expired():
                self._end_without_hub(silent=True)
        if not self._leaving:
            # Another rank of this host may have killed rank 0 because it had stopped answering.
            was_silent = monitor.silence(0) > _SILENT_FRACTION * HEARTBEAT_TIMEOUT_SECONDS
            self._end_without_hub(silent=was_silent)

    def _report_dead_before_joining(self) -> None:
        if not self._all_joined:
            for peer in self._notes.find_dead():
                self._send("dead before joining", peer=asdict(peer))

    def _receive(self) -> bytes:
        try:
            return self._connection.recv(1 << 16)
        except OSError:
            return b""

    def _handle(self, message: dict[str, Any]) -> None:
        if message["kind"] == "beat":
            self._hub_phase = Phase(*message["phase"])
            self._all_joined = message["all_joined"]
        else:
            self._end(Verdict.decode(message["verdict"]))

    def _end_without_hub(self, silent: bool) -> NoReturn:
        peer = self._hub_peer
        assert peer is not None
        phase = str(max(self._hub_phase, self._progress_report.now, key=lambda phase: phase.order))
        reporter = self._world.size - 1
        if silent:
            self._end(hung(peer, phase, HEARTBEAT_TIMEOUT_SECONDS, reporter))
        self._end(lost(peer, phase, reporter))

    def _end(self, verdict: Verdict) -> NoReturn:
        """End this process from any thread, without waiting for its other threads."""
        if verdict.hung:
            verdict.hung.kill_if_here()
        if verdict.reporter == self._world.rank:
            # The exception may be a consequence of another rank's death.
            trace = self._traceback if verdict.failed_rank == self._world.rank else ""
            below_progress_bar = "\n" if os.isatty(self._output) else ""
            # Not through sys.stderr: a stuck main thread may hold its lock.
            write_line(self._output, f"{below_progress_bar}{trace}error: {verdict.message}")
        if self._hub:
            self._hub.wait_until_heard()
        os._exit(verdict.status)
