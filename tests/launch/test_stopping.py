"""Runs that are stopped by a signal or lose a rank, and how the next start resumes them."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mot_megatron.job.ports import free_port
from tests.launch.entry_points import EntryPoint, wait_until
from tests.launch.jobs import (
    SCRIPT,
    SECONDS_TO_NOTICE_A_DEATH,
    assert_gone,
    assert_one_line_reports_the_lost_rank,
    rank_process,
    started,
)

pytestmark = pytest.mark.slow

STEPS = 80


def arguments_of(config: Path, runs: Path) -> list[str]:
    settings = [
        f"run.directory={runs}",
        f"training.train_steps={STEPS}",
        "training.micro_batch_size=4",
        "logging.interval_steps=1",
    ]
    return [f"--config={config}", *(f"--set={setting}" for setting in settings)]


def steps_printed(output: Path) -> int:
    """Return the last step on the console, or 0."""
    if not output.exists():
        return 0
    found = re.findall(rf"^step +(\d+)/{STEPS} ", output.read_text(), re.MULTILINE)
    return int(found[-1]) if found else 0


def saved_steps(runs: Path) -> list[int]:
    """Return the steps of the complete checkpoints."""
    names = [folder.name for folder in (runs / "small" / "checkpoints").glob("step_*")]
    return sorted(int(name.removeprefix("step_")) for name in names if "." not in name)


def finish(folder: Path, config: Path, runs: Path) -> dict[str, float]:
    """Train to the end in one process and return the held-out losses."""
    with EntryPoint(folder, SCRIPT, *arguments_of(config, runs)) as running:
        finished = running.wait()
    assert finished.status == 0, finished.errors
    modalities = json.loads((runs / "small" / "summary.json").read_text())["modalities"]
    return {name: values["held_out_bits_per_token"] for name, values in modalities.items()}


@pytest.fixture(scope="module")
def uninterrupted(config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    return finish(folder / "console", config, folder / "runs")


def assert_each_step_once(runs: Path) -> None:
    events = EventAccumulator(str(runs / "small" / "tensorboard"), {"scalars": 0}).Reload()
    steps = [point.step for point in events.Scalars("loss_train/text")]
    assert steps == list(range(1, STEPS + 1))


def assert_stopped(output: str, runs: Path) -> None:
    match = re.search(rf"asked to stop: saved after step (\d+)/{STEPS}", output)
    assert match, output
    assert 0 < int(match[1]) < STEPS
    assert saved_steps(runs)[-1] == int(match[1])


def test_signals_save_a_checkpoint_and_the_next_start_resumes(
    config: Path, tmp_path: Path, uninterrupted: dict[str, float]
) -> None:
    runs, output = tmp_path / "runs", tmp_path / "stdout"
    command = [sys.executable, SCRIPT, *arguments_of(config, runs)]
    with started(tmp_path, command) as process:
        wait_until(lambda: steps_printed(output) or process.poll() is not None, "first step")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, (tmp_path / "stderr").read_text()
    assert (tmp_path / "stderr").read_text() == ""
    assert_stopped(output.read_text(), runs)

    with EntryPoint(tmp_path / "second", SCRIPT, *arguments_of(config, runs)) as running:
        wait_until(lambda: steps_printed(tmp_path / "second" / "stdout"), "a step")
        os.kill(running.pid, signal.SIGINT)
        finished = running.wait(60)
    assert finished.status == 0
    assert finished.errors == ""
    assert f"continuing from {runs / 'small' / 'checkpoints'}" in finished.output
    assert_stopped(finished.output, runs)

    assert finish(tmp_path / "third", config, runs) == uninterrupted
    assert_each_step_once(runs)


def test_supervised_job_comes_back_after_a_killed_rank_and_stops_at_sigterm(
    config: Path, tmp_path: Path, uninterrupted: dict[str, float]
) -> None:
    runs, output = tmp_path / "runs", tmp_path / "stdout"
    options = ["--num_accelerators", "2", "--master_port", str(free_port())]
    command = ["bash", "launch/run.sh", "--quiet", *options, SCRIPT, *arguments_of(config, runs)]
    with started(tmp_path, command, {"PYTHON": sys.executable}) as job:
        wait_until(lambda: saved_steps(runs) or job.poll() is not None, "first checkpoint")
        ranks = [rank_process(job, rank) for rank in range(2)]
        ranks[1].kill()
        assert_gone(ranks, SECONDS_TO_NOTICE_A_DEATH)
        resumed = lambda: re.search(  # noqa: E731
            rf"^continuing from .*^step +\d+/{STEPS} ", output.read_text(), re.MULTILINE | re.DOTALL
        )
        wait_until(lambda: resumed() or job.poll() is not None, "a step after the restart")
        # Only one rank gets the signal; all must stop after the same step.
        rank_process(job, 1).send_signal(signal.SIGTERM)
        assert job.wait(60) == 0, (tmp_path / "stderr").read_text()
    errors = (tmp_path / "stderr").read_text().splitlines(keepends=True)
    said = [line for line in errors if line.startswith("mot supervise: ")]
    assert_one_line_reports_the_lost_rank(
        "".join(line for line in errors if line not in said), 1, ranks[1].pid
    )
    again, stopped = said
    assert "starting again: the launcher ended with status " in again
    assert re.search(r"stopped after step \d+: signal SIGTERM", stopped)
    assert_stopped(output.read_text(), runs)
    assert not (runs / "small" / "summary.json").exists()

    reached = finish(tmp_path / "third", config, runs)
    # One process finished what two had started: equal except for the order of sums.
    assert reached == pytest.approx(uninterrupted, abs=2e-3)
    assert_each_step_once(runs)
