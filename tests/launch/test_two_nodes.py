"""Two nodes simulated on one machine: two real launchers that do not know of each other."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mot_megatron.cli import benchmark_scaling as scaling
from mot_megatron.job.ports import free_port
from tests.launch.entry_points import ROOT, run_entry_point, wait_until
from tests.launch.jobs import (
    SCRIPT,
    assert_one_line_reports_the_lost_rank,
    started,
)

pytestmark = pytest.mark.slow

NODES = ("localhost", "node-b")
STEPS = 40
SAVED = 10

# Stand-ins for SLURM's commands: this machine plays both nodes, and every task has its own session.
SCONTROL = """#!/usr/bin/env bash
[ "$1" != requeue ] || exec touch "$(dirname "$0")/requeued-$2"
[ "$*" = "show hostnames localhost,node-b" ] || exit 9
printf 'localhost\\nnode-b\\n'
"""
SRUN = """#!/usr/bin/env bash
[ "$1 $2" = "--ntasks-per-node=1 --kill-on-bad-exit=1" ] || exit 9
while [[ "$1" = --* ]]; do shift; done
status=0
for node in 0 1; do SLURM_NODEID=$node setsid "$@" & done
for node in 0 1; do wait -n || status=$?; done
exit "$status"
"""


def arguments_of(config: Path, runs: Path) -> list[str]:
    settings = [
        f"run.directory={runs}",
        f"training.train_steps={STEPS}",
        f"checkpoint.interval_steps={SAVED}",
        "logging.interval_steps=1",
        "training.micro_batch_size=4",
    ]
    return [f"--config={config}", *(f"--set={setting}" for setting in settings)]


def losses(runs: Path) -> list[float]:
    """Return the training loss of text after every step."""
    events = EventAccumulator(str(runs / "small" / "tensorboard"), {"scalars": 0}).Reload()
    points = events.Scalars("loss_train/text")
    assert [point.step for point in points] == list(range(1, STEPS + 1))
    return [point.value for point in points]


def test_two_node_job_resumes_under_slurm_after_a_lost_rank(config: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    arguments = arguments_of(config, runs)
    lost = lose_a_rank_and_stop(tmp_path, arguments, runs)
    errors = (tmp_path / "slurm" / "stderr").read_text().splitlines(keepends=True)
    (reason,) = (line for line in errors if line.startswith("error: "))
    assert_one_line_reports_the_lost_rank(reason, 1, lost)
    assert sum("mot supervise: starting again: " in line for line in errors) == len(NODES)
    (stopped,) = re.findall(
        rf"asked to stop: saved after step (\d+)/{STEPS}",
        (tmp_path / "slurm" / "stdout").read_text(),
    )
    assert SAVED < int(stopped) < STEPS
    assert (runs / "small" / "checkpoints" / f"step_{int(stopped):08d}").exists()
    requeued = tmp_path / "bin" / "requeued-7"
    requeued.unlink()  # it was put back into the queue

    finish_under_slurm(tmp_path, arguments)
    assert not requeued.exists()
    assert json.loads((runs / "small" / "summary.json").read_text())["world_size"] == 2

    alone = tmp_path / "alone"
    assert run_entry_point(alone, SCRIPT, *arguments_of(config, alone)).status == 0
    assert losses(runs) == pytest.approx(losses(alone), abs=1e-3)


def test_scaling_is_measured_on_the_nodes_of_a_slurm_job(
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    put_stand_ins(tmp_path)
    variables = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "localhost,node-b",
        "SLURM_JOB_ID": "7",
        "RANKS_PER_NODE": "1",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    command = ["measure", f"--config={config}", "--world-size=2", "--micro-batches=1", "--slurm"]
    command += ["--synthetic", "--share=text=0.5", "--share=image=0.5", "--steps=2", "--warmup=1"]
    command += ["--repeats=1", f"--output={tmp_path / 'scaling'}", "--json"]
    assert scaling.main(command) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["world_size"] == 2
    (split,) = row["splits"].values()
    assert sum(split.values()) == pytest.approx(1)
    assert split["gradient reduction"] > 0
    rates = row["modality_tokens_per_second"]
    assert rates["text"] == rates["image"] > 0
    assert rates["speech"] == 0
    hosts = tmp_path / "scaling" / "points" / "model-2-0.hosts"
    assert hosts.read_text() == "localhost slots=1\nnode-b slots=1\n"


def lose_a_rank_and_stop(folder: Path, arguments: list[str], runs: Path) -> int:
    """Kill a rank, then send the signal that SLURM sends before the time limit to all processes.

    Returns the process ID of the killed rank.
    """
    script = (ROOT / "launch" / "slurm.sbatch").read_text()
    (name,) = re.findall(r"^#SBATCH --signal=(\w+)@\d+$", script, re.MULTILINE)
    with slurm_job(folder, arguments) as job:
        output = folder / "slurm" / "stdout"
        family = psutil.Process(job.pid)
        checkpoint = runs / "small" / "checkpoints" / f"step_{SAVED:08d}"
        wait_until(lambda: checkpoint.exists() or job.poll() is not None, "first checkpoint")
        (lost,) = (
            process
            for process in family.children(recursive=True)
            if "--local_rank=0" in process.cmdline() and process.environ()["RANK"] == "1"
        )
        lost.kill()
        stepped = lambda: re.search(  # noqa: E731
            r"^continuing from .*^step +\d+/", output.read_text(), re.MULTILINE | re.DOTALL
        )
        wait_until(lambda: stepped() or job.poll() is not None, "a step after the restart")
        (srun,) = family.children()
        for process in srun.children(recursive=True):
            process.send_signal(signal.Signals[f"SIG{name}"])
        assert_clean_end(folder, job)
    return lost.pid


def finish_under_slurm(folder: Path, arguments: list[str]) -> None:
    with slurm_job(folder, arguments) as job:
        assert_clean_end(folder, job)
    errors = (folder / "slurm" / "stderr").read_text()
    assert all(line.startswith("mot supervise: ") for line in errors.splitlines()), errors


def assert_clean_end(folder: Path, job: subprocess.Popen[bytes]) -> None:
    status = job.wait(180)
    errors = (folder / "slurm" / "stderr").read_text()
    assert status == 0, errors
    assert "continuing from" in (folder / "slurm" / "stdout").read_text()
    assert not (ROOT / "hostfile.slurm-7").exists()


def put_stand_ins(folder: Path) -> None:
    (folder / "bin").mkdir(exist_ok=True)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)


def slurm_job(
    folder: Path, arguments: list[str]
) -> AbstractContextManager[subprocess.Popen[bytes]]:
    """Run launch/slurm.sbatch on two nodes, with stand-ins for srun and scontrol."""
    put_stand_ins(folder)
    environment = {
        "PATH": f"{folder / 'bin'}:/usr/bin:/bin",
        "PYTHON": sys.executable,
        "RANKS_PER_NODE": "1",
        "MASTER_PORT": str(free_port()),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": ",".join(NODES),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "REQUEUE": "1",
    }
    command = ["bash", str(ROOT / "launch" / "slurm.sbatch"), *arguments]
    return started(folder / "slurm", command, environment)


def test_slurm_script_without_gpus_is_an_error(tmp_path: Path) -> None:
    environment = {"PYTHON": sys.executable, "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7"}
    with started(tmp_path, ["bash", str(ROOT / "launch" / "slurm.sbatch")], environment) as job:
        assert job.wait(30) == 2
    (line,) = (tmp_path / "stderr").read_text().splitlines()
    assert line.startswith("error: no GPUs in this job")


def test_launcher_can_read_the_deepspeed_env_example() -> None:
    # The launcher splits every line at "=", so comments and empty lines are not allowed.
    lines = (ROOT / "launch" / "deepspeed_env.example").read_text().splitlines()
    assert {line.partition("=")[0] for line in lines} >= {"OMP_NUM_THREADS", "NCCL_SOCKET_IFNAME"}
    assert all(line.partition("=")[0].isidentifier() and line.partition("=")[2] for line in lines)
