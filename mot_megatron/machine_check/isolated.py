"""Run a check in a process of its own, so that its crash or hang ends nothing else."""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

from mot_megatron.files import write_atomically
from mot_megatron.job.processes import Process, descendants_of, group_members
from mot_megatron.machine_check.checks import Check, Context
from mot_megatron.machine_check.outcome import Outcome

_END_SECONDS = 10.0
"""How long a check that is told to stop may take to end its own processes."""
_POLL_SECONDS = 0.05
_LONGEST_REASON = 300


def run_isolated(check: Check, context: Context, seconds: float) -> Outcome | None:
    """Run a check in a new process and return its outcome, or None if it was not done in time.

    The process and all that it has started are killed if it is not done in time, and what is left
    of them after its end. What it prints goes to a file in the folder ``logs``.

    Args:
        check: The check.
        context: What it is given.
        seconds: Its time limit.
    """
    log = context.directory / log_name(check)
    result = log.with_suffix(".outcome.json")
    result.unlink(missing_ok=True)
    log.write_bytes(b"")
    process = multiprocessing.get_context("spawn").Process(
        target=_work, args=(check, context, log, result)
    )
    process.start()
    assert process.pid is not None
    started: list[Process] = []
    try:
        process.join(seconds)
        timed_out = process.is_alive()
    finally:
        # After Ctrl-C as well, no process may go on.
        if process.is_alive():
            started += map(Process.of, descendants_of(process.pid))
            process.terminate()
            process.join(_END_SECONDS)
        process.kill()
        process.join()
        _kill([*started, *map(Process.of, group_members(process.pid))])
    if timed_out:
        return None
    if not result.exists():
        return Outcome("FAIL", _reason(process.exitcode, log), f"see {log_name(check)}")
    return Outcome(**json.loads(result.read_text()))


def log_name(check: Check) -> str:
    """Return the file with what a check prints, relative to the folder of the report."""
    stem = "".join(c if c.isalnum() or c in "._" else "-" for c in check.name)
    return f"logs/{stem}.log"


def _work(check: Check, context: Context, log: Path, result: Path) -> None:
    """Run a check in this process and write its outcome to a file."""
    os.setsid()
    # The exception ends what the check has started, such as a job.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    faulthandler.enable()
    outcome = check.run(context)
    write_atomically(result, json.dumps(asdict(outcome)) + "\n")


def _kill(processes: list[Process]) -> None:
    """Kill processes and wait until they are gone, with the devices' memory that they hold."""
    for each in processes:
        each.kill_if_here()
    deadline = time.monotonic() + _END_SECONDS
    while not all(each.is_dead for each in processes) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


def _reason(status: int | None, log: Path) -> str:
    """Return how a process ended, and the last line that it printed."""
    ending = f"status {status}"
    if status is not None and status < 0:
        ending = f"signal {signal.Signals(-status).name}"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last = f": {lines[-1].strip()[:_LONGEST_REASON]}" if lines else ""
    return f"the process ended with {ending}{last}"
