"""The supervisor with a shell script in the launcher's place."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from mot_megatron.job.processes import Process
from mot_megatron.run import supervisor as module
from mot_megatron.run.outcome import OUTCOME_FILE, STOP_FILE
from mot_megatron.run.relaunch import Decision, Record, RestartPolicy
from mot_megatron.run.supervisor import Supervisor, Task

# $1 is the run's folder; "attempts" counts the starts.
COUNT = 'cd "$1"; echo x >> attempts; n=$(wc -l < attempts); '
STEP = 'step() { echo "$1" > last_step; }; '
SAVE = 'save() { mkdir -p "checkpoints/step_0000000$1"; }; '
DONE = 'done_() { echo \'{"kind": "done", "step": 9}\' > outcome.json; exit 0; }; '


def supervise(run: Path, script: str, most: int = 5, **options: object) -> tuple[int, list[str]]:
    """Return the exit status, and what the supervisor said."""
    run.mkdir(exist_ok=True)
    said: list[str] = []
    command = ("bash", "-c", COUNT + STEP + SAVE + DONE + script, "launcher", str(run))
    task = Task(command, run, **options)  # type: ignore[arg-type]
    return Supervisor(task, RestartPolicy(most, 600.0), said.append).run(), said


def attempts(run: Path) -> int:
    return len((run / "attempts").read_text().splitlines())


def stopped(launcher_ended: bool) -> str:
    fields = {"kind": "stopped", "step": 4, "reason": "why", "launcher_ended": launcher_ended}
    return f"echo '{json.dumps(fields)}' > {OUTCOME_FILE}; "


def test_failures_with_progress_are_mended(tmp_path: Path) -> None:
    status, said = supervise(tmp_path, "step $n; save $n; [ $n -lt 3 ] && exit 247; done_")
    assert (status, attempts(tmp_path)) == (0, 3)
    assert "status 247, after step 2, newest checkpoint: step 2 (restart 2 of at most 5" in said[1]
    assert said[2] == "done after step 9"
    assert len(Record(tmp_path)) == 2


@pytest.mark.parametrize(
    ("script", "status", "starts", "words"),
    [
        ("exit 2", 2, 1, "a restart does not mend this error"),
        ("step 7; save 5; exit 3", 3, 2, "failed there before (after step 7, newest checkpoint:"),
        ("exit 1", 1, 2, "failed there before (before the first step, newest checkpoint: none)"),
        ("step $n; exit 1", 1, 4, "it was started again 3 times within 10 minutes already"),
        ("step $n; kill -9 $$", 3, 4, "it was started again 3 times"),
        # The launcher ends well although its ranks have not: it hides that a process was killed.
        ("step 1; exit 0", 3, 2, "failed there before"),
        (stopped(False) + "exit 1", 0, 1, "stopped after step 4: why"),
        (stopped(True) + "step $n; [ $n -lt 2 ] && exit 0; done_", 0, 2, "done after step 9"),
    ],
)
def test_what_follows_an_end(
    tmp_path: Path, script: str, status: int, starts: int, words: str
) -> None:
    found, said = supervise(tmp_path, script, most=3)
    assert (found, attempts(tmp_path)) == (status, starts)
    assert words in said[-1]


def test_what_an_earlier_job_left_does_not_count(tmp_path: Path) -> None:
    (tmp_path / OUTCOME_FILE).write_text('{"kind": "done", "step": 9}')
    (tmp_path / "last_step").write_text("7")
    status, said = supervise(tmp_path, "exit 1")
    assert status == 1
    assert "before the first step" in said[-1]


def test_ranks_that_a_launcher_leaves_behind_are_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LEAVE_SECONDS", 0.5)
    script = "sleep 100 & echo $! > pid; [ $n -lt 2 ] && exit 1; kill %1; done_"
    status, said = supervise(tmp_path, script)
    assert (status, said[0]) == (0, "killing 1 processes that the launcher left behind")


def test_followers_do_what_the_first_node_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FOLLOW_SECONDS", 60.0)
    record = Record(tmp_path)
    record.add(Decision(False, 1, "of an earlier job"))

    def decide() -> None:
        decisions = (Decision(True, 3, "lost"), Decision(False, 75, "stopped"))
        for starts, decision in enumerate(decisions, start=1):
            while not (tmp_path / "attempts").exists() or attempts(tmp_path) < starts:
                time.sleep(0.05)
            record.add(decision)

    thread = threading.Thread(target=decide)
    thread.start()
    # Its own launcher says bad input, which here is a consequence.
    status, said = supervise(tmp_path, "exit 2", node=1, has_followers=True, status_if_stopped=75)
    thread.join()
    assert (status, attempts(tmp_path)) == (0, 2)
    assert said == ["starting again: as on node 0: lost", "as on node 0: stopped"]


def test_followers_wait_for_a_limited_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FOLLOW_SECONDS", 0.5)
    status, said = supervise(tmp_path, "exit 0", node=1, has_followers=True)
    assert status == 3
    assert said[-1].startswith("not started again: no word from node 0")


LOCK = """
import json, sys
from dataclasses import asdict
from mot_megatron.job.processes import Process
print(json.dumps({"owner": asdict(Process.of(int(sys.argv[1])))}))
"""
# The job has locked its folder, saves when it is asked to stop, and ignores the signal itself.
STOPPABLE = (
    'python -c "$LOCK" $$ > lock; mv lock running.json; '
    "until [ -e stop ]; do sleep 0.1; done; rm running.json; " + stopped(False) + "exit 0"
)
PROGRAM = """
import sys
from pathlib import Path
from mot_megatron.run.relaunch import RestartPolicy
from mot_megatron.run.supervisor import Supervisor, Task
task = Task(tuple(sys.argv[2:]), Path(sys.argv[1]), status_if_stopped=75)
sys.exit(Supervisor(task, RestartPolicy(5, 600.0), print).run())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_the_run_and_not_the_launcher(
    tmp_path: Path, number: signal.Signals
) -> None:
    command = ["bash", "-c", COUNT + STOPPABLE, "launcher", str(tmp_path)]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "LOCK": LOCK, "PATH": path}
    supervisor = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    process = subprocess.Popen([*supervisor, *command], env=environment)
    deadline = time.monotonic() + 30
    while not (tmp_path / "running.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    if number == signal.SIGUSR1:
        # SLURM sends it to every process of a task.
        (launcher,) = psutil.Process(process.pid).children()
        launcher.send_signal(number)
    process.send_signal(number)
    assert process.wait(120) == 75
    assert attempts(tmp_path) == 1
    assert not (tmp_path / STOP_FILE).exists()


def test_the_job_that_owns_the_folder_is_not_stopped(tmp_path: Path) -> None:
    owner = asdict(Process.of(os.getpid()))
    (tmp_path / "running.json").write_text(json.dumps({"owner": owner}))
    command = ["bash", "-c", COUNT + "sleep 2; exit 2", "launcher", str(tmp_path)]
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path), *command])
    deadline = time.monotonic() + 30
    while not (tmp_path / "attempts").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    while process.poll() is None:
        assert not (tmp_path / STOP_FILE).exists()
        time.sleep(0.05)
    assert process.returncode == 2
