"""Checks with a known end, for the tests; each runs in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from mot_megatron.machine_check.checks import Check, Context
from mot_megatron.machine_check.outcome import Outcome

HANG_SECONDS = 600


def passes(context: Context, *, words: str = "fine") -> Outcome:
    sys.stdout.write("what a check prints\n")
    with context.file("ran").open("a") as file:
        file.write(f"{words}\n")
    return Outcome("PASS", words, "", {"number": 1.5})


def is_slow(context: Context) -> Outcome:
    del context
    return Outcome("SLOW", "half | of it", "wait")


def raises(context: Context) -> Outcome:
    raise ValueError(f"no {context.device} today")


def crashes(context: Context) -> Outcome:
    del context
    sys.stderr.write("before the crash\n")
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def hangs(context: Context) -> Outcome:
    """Start a process in a session of its own, as a job is, and hang without hearing signals."""
    child = subprocess.Popen(
        [sys.executable, "-c", f"import time; time.sleep({HANG_SECONDS})"], start_new_session=True
    )
    context.file("pid").write_text(str(child.pid))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(HANG_SECONDS)
    raise AssertionError


def fake(name: str, function: str = "passes", seconds: float = 30.0, **settings: str) -> Check:
    """Return a check that runs one of these functions."""
    return Check(name, f"{__name__}:{function}", seconds, settings=settings)
