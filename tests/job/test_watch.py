"""The watchdog: if one rank ends abnormally, all ranks end, and one line reports the cause."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import socket
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import asdict
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from torch.multiprocessing import get_context

from mot_megatron.errors import ConfigError
from mot_megatron.job import distributed, handshake, heartbeats, launch, verdict, watch, watch_hub
from mot_megatron.job.ports import free_port
from mot_megatron.job.processes import Process
from mot_megatron.job.progress_report import Phase, ProgressReport
from mot_megatron.job.start_notes import StartNotes
from tests.ranks import ENVIRONMENT, PRELOAD

pytestmark = pytest.mark.slow

RANKS = 3
HEARTBEAT_TIMEOUT_SECONDS = 6.0
"""Instead of 30; still longer than the watching process may be delayed."""
LONGEST_END = 60.0
"""Seconds; it takes one, but more if the machine is busy. The messages tell why a job ended."""
HOST = re.escape(socket.gethostname())


class Job:
    """Ranks under the watchdog that do no work; ``event`` happens to the ``affected`` ones."""

    def __init__(self, folder: Path, event: str, *affected: int) -> None:
        os.environ.update(ENVIRONMENT)
        context = get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        port = free_port()
        self.folder = folder
        self.processes: list[BaseProcess] = [
            context.Process(
                target=_rank, args=(rank, port, folder, event if rank in affected else "work")
            )
            for rank in range(RANKS)
        ]
        for process in self.processes:
            process.start()

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def wait_until_all_work(self) -> None:
        deadline = time.monotonic() + 60
        while len(list(self.folder.glob("ready.*"))) < RANKS:
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def pid(self, rank: int) -> int:
        number = self.processes[rank].pid
        assert number is not None
        return number

    def wait(self, seconds: float) -> list[int | None]:
        """Wait up to ``seconds`` and return every rank's exit status, or None if still running."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def errors(self) -> dict[int, str]:
        """Return the standard error of every rank that wrote to it."""
        texts = {rank: (self.folder / f"stderr.{rank}").read_text() for rank in range(RANKS)}
        return {rank: text for rank, text in texts.items() if text}


def _rank(rank: int, port: int, folder: Path, event: str) -> None:
    os.dup2(os.open(folder / f"stderr.{rank}", os.O_WRONLY | os.O_CREAT), 2)
    watch.HEARTBEAT_TIMEOUT_SECONDS = watch_hub.HEARTBEAT_TIMEOUT_SECONDS = (
        HEARTBEAT_TIMEOUT_SECONDS
    )
    launchers = (Process.of(os.getppid()),)
    place = launch.Launch(
        rank, RANKS, rank, "127.0.0.1", port, is_on_one_node=True, launchers=launchers
    )
    StartNotes(place.host_key).write(rank, clear=rank == 0 and place.host_key_may_recur)
    if event == "die before joining":
        os._exit(7)
    world = distributed.find_world(place)
    progress_report = ProgressReport()
    with watch.Watchdog(world, progress_report):
        progress_report.enter("data", step=12)
        (folder / f"ready.{rank}").touch()
        _act(event)


def _act(event: str) -> None:
    if event == "defect":
        raise ValueError("a defect\nof two lines")
    if event == "user error":
        raise ConfigError("a.key = 3; allowed: 4")
    if event == "work":
        time.sleep(100)  # as in a collective, the main thread cannot end on its own
    assert event == "finish"


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_killed_rank_ends_all_ranks(tmp_path: Path, victim: int) -> None:
    with Job(tmp_path, "work") as job:
        job.wait_until_all_work()
        os.kill(job.pid(victim), signal.SIGKILL)
        expected: list[int | None] = [verdict.LOST_STATUS] * RANKS
        expected[victim] = -signal.SIGKILL
        assert job.wait(LONGEST_END) == expected
        line = (
            f"error: rank {victim} (host HOST, pid {job.pid(victim)}) died during step 12, data\n"
        )
        # Rank 0 reports; if rank 0 was killed, the last rank does.
        reporter = 0 if victim else RANKS - 1
        assert job.errors() == {reporter: line.replace("HOST", socket.gethostname())}


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_without_heartbeats_ends_all_ranks(tmp_path: Path, victim: int) -> None:
    with Job(tmp_path, "work") as job:
        job.wait_until_all_work()
        os.kill(job.pid(victim), signal.SIGSTOP)
        expected: list[int | None] = [verdict.LOST_STATUS] * RANKS
        expected[victim] = -signal.SIGKILL  # by the others: it would stay for ever
        assert job.wait(HEARTBEAT_TIMEOUT_SECONDS + LONGEST_END) == expected
        ((reporter, line),) = job.errors().items()
        assert reporter == (0 if victim else RANKS - 1)
        assert re.fullmatch(
            rf"error: rank {victim} \(host {HOST}, pid {job.pid(victim)}\) stopped answering during"
            r" step 12, data: no heartbeat for 6 s\n",
            line,
        )


@pytest.mark.parametrize("culprit", [0, 2])
def test_an_exception_on_one_rank_ends_all_ranks(tmp_path: Path, culprit: int) -> None:
    with Job(tmp_path, "defect", culprit) as job:
        assert job.wait(LONGEST_END) == [verdict.DEFECT_STATUS] * RANKS
        ((reporter, text),) = job.errors().items()
        assert reporter == culprit
        first, *_, last = text.splitlines()
        assert first == "Traceback (most recent call last):"
        assert re.fullmatch(
            rf"error: rank {culprit} \(host {HOST}, pid {job.pid(culprit)}\) failed during step 12,"
            " data: ValueError: a defect",
            last,
        )


def test_a_user_error_on_all_ranks_is_one_line(tmp_path: Path) -> None:
    with Job(tmp_path, "user error", *range(RANKS)) as job:
        assert job.wait(LONGEST_END) == [verdict.USER_ERROR_STATUS] * RANKS
        assert job.errors() == {0: "error: a.key = 3; allowed: 4\n"}


def test_a_user_error_on_one_rank_names_it(tmp_path: Path) -> None:
    with Job(tmp_path, "user error", 1) as job:
        assert job.wait(LONGEST_END) == [verdict.USER_ERROR_STATUS] * RANKS
        text = f"error: rank 1 (host {socket.gethostname()}, pid {job.pid(1)}): a.key = 3;"
        assert job.errors() == {1: f"{text} allowed: 4\n"}


def test_a_finished_rank_is_not_reported_as_lost(tmp_path: Path) -> None:
    with Job(tmp_path, "finish", 0, 1) as job:
        job.wait_until_all_work()
        job.processes[1].join(10)
        assert job.processes[1].exitcode == 0
        job.processes[0].join(HEARTBEAT_TIMEOUT_SECONDS + 2)
        assert job.processes[0].is_alive()  # waits for rank 2
        assert job.processes[2].is_alive()
        os.kill(job.pid(2), signal.SIGKILL)
        assert job.wait(LONGEST_END) == [verdict.LOST_STATUS, 0, -signal.SIGKILL]
        assert list(job.errors()) == [0]


def test_all_ranks_finish_without_errors(tmp_path: Path) -> None:
    with Job(tmp_path, "finish", *range(RANKS)) as job:
        assert job.wait(LONGEST_END) == [0] * RANKS
        assert job.errors() == {}


@pytest.mark.parametrize("victim", [1, 2])
def test_a_rank_that_dies_before_joining_ends_all_ranks(tmp_path: Path, victim: int) -> None:
    with Job(tmp_path, "die before joining", victim) as job:
        expected: list[int | None] = [verdict.LOST_STATUS] * RANKS
        expected[victim] = 7
        # The hub does not wait for a dead latecomer.
        assert job.wait(LONGEST_END) == expected
        line = f"error: rank {victim} (host HOST, pid {job.pid(victim)}) died during start\n"
        assert job.errors() == {0: line.replace("HOST", socket.gethostname())}


def test_notes_of_an_earlier_launch_count_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    notes = StartNotes(KEY)
    notes.write(rank=1, clear=False)
    assert notes.find_dead() == []
    (path,) = tmp_path.rglob("*.json")
    dead = {**asdict(verdict.Peer.of_this_process(1)), "started": "0"}
    path.write_text(json.dumps(dead))
    assert [peer.rank for peer in notes.find_dead()] == [1]
    assert StartNotes(b"of another launch").find_dead() == []
    path.with_name(path.name.replace(".1.json", ".2.json")).write_text("[" * 3000)
    notes.write(rank=0, clear=False)
    assert [peer.rank for peer in notes.find_dead()] == [1]
    notes.write(rank=0, clear=True)
    assert notes.find_dead() == []
    path.parent.chmod(0o777)  # anyone could have written what is there
    path.write_text(json.dumps(dead))
    assert notes.find_dead() == []


def test_only_ranks_of_one_launch_on_one_host_share_notes() -> None:
    def host_key(**changes: Any) -> bytes:
        fields: dict[str, Any] = {
            "launchers": (Process("host", 1, "2"),),
            "step": "3",
            "restart": "4",
            **changes,
        }
        return launch.Launch(0, 8, 0, "127.0.0.1", 1234, is_on_one_node=False, **fields).host_key

    other = {"launchers": (Process("host", 1, "3"),), "step": "4", "restart": "5"}
    keys = [host_key(), *(host_key(**{name: value}) for name, value in other.items())]
    assert len(set(keys)) == 4
    assert host_key() == keys[0]
    # A shell that starts ranks by hand, twice.
    place = launch.Launch(0, 8, 0, "127.0.0.1", 1234, is_on_one_node=False, launchers=())
    assert place.host_key_may_recur


def test_ranks_that_never_start_are_named() -> None:
    text = verdict.absent([2, 5], world_size=8, seconds=600).message
    assert text.startswith("2 of 8 ranks (2, 5) have not started within 600 s")


KEY = b"of this launch"


def start_hub(world_size: int = 2) -> watch_hub.WatchHub:
    me = verdict.Peer.of_this_process(0)
    return watch_hub.WatchHub("127.0.0.1", world_size, KEY, me, ProgressReport())


def connect(hub: watch_hub.WatchHub) -> socket.socket:
    return socket.create_connection(("127.0.0.1", hub.port), 10)


def introduce(hub: watch_hub.WatchHub, rank: int = 1, key: bytes = KEY) -> socket.socket:
    """A connection as that rank."""
    connection = connect(hub)
    handshake.introduce(connection, key, verdict.Peer.of_this_process(rank), 10)
    return connection


def ended(connection: socket.socket) -> bool:
    """Whether the hub closes the connection."""
    connection.settimeout(10)
    with suppress(ConnectionError):
        while connection.recv(1000):
            pass
    return True


GARBAGE = (
    b"GET / HTTP/1.1\r\n\r\n",
    b"[" * 50_000 + b"\n",
    b"[1]\n",
    b"{}\n",
    b'{"kind": "hello", "peer": 3}\n',
    b"\xff\xfe\n",
    b"x" * (1 << 17),
)


def test_strangers_are_turned_away() -> None:
    hub = start_hub()
    for text in GARBAGE:
        with connect(hub) as stranger:
            with suppress(ConnectionError):
                stranger.sendall(text)
            assert ended(stranger)
    with connect(hub) as half_a_line:
        half_a_line.sendall(b'{"kind"')
        introduce(hub).close()


def test_a_rank_of_another_job_is_refused() -> None:
    hub = start_hub()
    with pytest.raises(handshake.RefusedError, match="it belongs to another job"):
        introduce(hub, key=b"of another launch")
    with introduce(hub):
        with pytest.raises(handshake.RefusedError, match=r"rank 1 \(host .*\) is there already"):
            introduce(hub)
        with pytest.raises(handshake.RefusedError):
            introduce(hub, rank=2)


def test_the_hub_proves_that_it_knows_the_secret() -> None:
    with socket.create_server(("127.0.0.1", 0)) as impostor:
        connection = socket.create_connection(impostor.getsockname(), 10)
        accepted, _ = impostor.accept()
        accepted.sendall(verdict.encode("challenge", challenge="0"))
        accepted.sendall(verdict.encode("welcome", peer={}, proof="guess"))
        with pytest.raises(handshake.RefusedError):
            handshake.introduce(connection, KEY, verdict.Peer.of_this_process(1), 10)
        accepted.close()
        connection.close()


def test_the_hub_survives_more_connections_than_descriptors() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    connections: list[socket.socket] = []
    with ExitStack() as stack:
        hub = start_hub()
        open_files = len(list(Path("/proc/self/fd").iterdir()))
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_files + 150, hard))
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        with suppress(OSError):
            while True:  # each takes one here, and one of the hub's, in the same process
                connections.append(stack.enter_context(connect(hub)))
        assert len(connections) > 50
        for connection in connections[: len(connections) // 2]:
            connection.close()
        deadline = time.monotonic() + 20
        while True:
            try:
                introduce(hub).close()
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.2)


def test_a_rank_that_sends_garbage_is_lost_and_the_hub_says_so() -> None:
    hub = start_hub()
    with introduce(hub, 0) as healthy, introduce(hub, 1) as broken:
        broken.sendall(b'{"kind": "beat", "phase": 3}\n')
        healthy.settimeout(10)
        received = b""
        while b"verdict" not in received:
            received += healthy.recv(1000)
        assert b"rank 1" in received


# --- heartbeats, messages and phases


def test_timeout_counts_from_the_last_heartbeat() -> None:
    now = 0.0
    pulse = heartbeats.HeartbeatMonitor(30, clock=lambda: now)
    pulse.heard(1)
    pulse.heard(2)
    pulse.heard(3)
    while now < 28:
        now += 2
        pulse.heard(1)
        assert pulse.expired() == []
    pulse.forget(3)
    now = 31
    assert pulse.expired() == [2]


def test_a_pause_of_the_watching_process_expires_no_rank() -> None:
    now = 0.0
    pulse = heartbeats.HeartbeatMonitor(30, clock=lambda: now)
    pulse.heard(1)
    now = 100.0  # this process was suspended; the other ranks may have been as well
    assert pulse.expired() == []
    while now < 130:
        now += 2
        assert pulse.expired() == []
    now = 132
    assert pulse.expired() == [1]


def test_partial_messages_are_reassembled() -> None:
    lines = verdict.Lines()
    sent = verdict.encode("beat", phase=Phase(4, "data", 12)) + verdict.encode("goodbye")
    got = [message for byte in sent for message in lines.feed(bytes([byte]))]
    assert got == [{"kind": "beat", "phase": [4, "data", 12]}, {"kind": "goodbye"}]


def test_phases_are_ordered_by_progress() -> None:
    progress_report = ProgressReport()
    assert str(progress_report.now) == "start"
    progress_report.enter("data", step=12)
    before = progress_report.now
    progress_report.enter("optimizer")
    assert str(progress_report.now) == "step 12, optimizer"
    assert progress_report.now.order > before.order


def test_a_reused_pid_is_not_killed() -> None:
    me = verdict.Peer.of_this_process(0)
    verdict.Peer(me.host, me.pid, "1", 0).kill_if_here()
    verdict.Peer("elsewhere", me.pid, me.started, 0).kill_if_here()
