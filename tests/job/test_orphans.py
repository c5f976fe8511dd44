"""Ranks that are starting exit when their launcher ends."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mot_megatron.job.verdict import LOST_STATUS

# The process waits for half a minute, unless its launcher (here a child) ends before.
PROGRAM = """
import subprocess, sys, time
from mot_megatron.job.orphans import leave_without_launcher
from mot_megatron.job.processes import Process
from mot_megatron.job.progress_report import ProgressReport
launcher = subprocess.Popen(["sleep", "100"])
report = ProgressReport()
leave_without_launcher([Process.of(launcher.pid)], report, reports=True)
if sys.argv[1] == "training":
    report.enter("data", 1)
launcher.kill()
time.sleep(30 if sys.argv[1] == "starting" else 1.5)
"""


@pytest.mark.parametrize(("when", "status"), [("starting", LOST_STATUS), ("training", 0)])
def test_only_ranks_that_are_starting_leave(when: str, status: int) -> None:
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM, when], capture_output=True, text=True, timeout=25
    )
    assert found.returncode == status
    said = found.stdout.endswith("has ended; leaving before the first step\n")
    assert said == (when == "starting")
