"""Signals that request a run to stop."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mot_megatron.job.stop import StopRequest

# The test closes the terminal of this program once it has printed "ready"; it then goes on working.
AT_A_TERMINAL = """
import fcntl, pathlib, signal, sys, termios, time
from mot_megatron.job.stop import StopRequest
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
with StopRequest() as stop:
    print("ready", flush=True)
    deadline = time.monotonic() + 30
    while not stop.requested and time.monotonic() < deadline:
        time.sleep(0.01)
    print("a line", flush=True)
    print("a line", file=sys.stderr, flush=True)
    pathlib.Path(sys.argv[1]).write_text(f"saved, {stop.requested}")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("before", [signal.SIG_DFL, signal.SIG_IGN])
def test_signals_request_a_stop_only_inside_the_block(
    number: signal.Signals, before: signal.Handlers
) -> None:
    # Ranks inherit ignored signals from their launcher.
    original = signal.signal(number, before)
    try:
        with StopRequest() as stop:
            assert not stop.requested
            os.kill(os.getpid(), number)
            assert stop.requested
        assert signal.getsignal(number) == before
    finally:
        signal.signal(number, original)


def test_sighup_requests_a_stop_unless_it_is_ignored() -> None:
    original = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.requested
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup starts a process
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, original)


def test_work_can_finish_after_the_terminal_closes(tmp_path: Path) -> None:
    terminal, end_of_process = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", AT_A_TERMINAL, str(tmp_path / "saved")],
        stdin=end_of_process,
        stdout=end_of_process,
        stderr=end_of_process,
        start_new_session=True,
    )
    os.close(end_of_process)
    try:
        assert os.read(terminal, 5) == b"ready"
        os.close(terminal)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / "saved").read_text() == "saved, True"
