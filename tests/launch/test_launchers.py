"""Jobs that meet on one port or in one folder, and jobs whose launcher ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mot_megatron.cli import benchmark_scaling as scaling
from mot_megatron.job.ports import free_port
from mot_megatron.scaling.machine import load_machine
from tests.launch.entry_points import EntryPoint, Finished, wait_until
from tests.launch.jobs import (
    LAUNCHER,
    SCRIPT,
    SECONDS_TO_NOTICE_A_DEATH,
    assert_gone,
    rank_process,
    started,
)

pytestmark = pytest.mark.slow

COLLECTIVES = ["all-reduce", "all-gather", "reduce-scatter", "all-to-all", "broadcast", "reduce"]


def arguments_of(config: Path, runs: Path, steps: int) -> list[str]:
    settings = [
        f"run.directory={runs}",
        f"training.train_steps={steps}",
        "logging.interval_steps=5",
        "checkpoint.interval_steps=100000",
    ]
    return [f"--config={config}", *(f"--set={setting}" for setting in settings)]


def launcher(config: Path, runs: Path, steps: int, port: int | None = None) -> list[str]:
    options = ["--num_accelerators", "2", "--master_port", str(port or free_port())]
    return [*LAUNCHER, *options, SCRIPT, *arguments_of(config, runs, steps)]


def wait_for_a_step(folder: Path, job: subprocess.Popen[bytes]) -> None:
    output = folder / "stdout"
    wait_until(lambda: "step " in output.read_text() or job.poll() is not None, "a step")


def test_a_second_job_on_the_port_ends_and_the_first_goes_on(config: Path, tmp_path: Path) -> None:
    port, one, other = free_port(), tmp_path / "one", tmp_path / "other"
    with started(one, launcher(config, one / "runs", 10**6, port)) as first:
        wait_for_a_step(one, first)
        with started(other, launcher(config, other / "runs", 10, port)) as second:
            assert second.wait(300) != 0
        reasons = [
            line
            for line in (other / "stderr").read_text().splitlines()
            if line.startswith("error: ")
        ]
        assert len(reasons) == 1
        assert f"port {port}" in reasons[0]
        assert "--master_port" in reasons[0]
        assert first.poll() is None
        (one / "runs" / "small" / "stop").touch()
        assert first.wait(300) == 0
    assert (one / "stderr").read_text() == ""
    assert "asked to stop: saved after step" in (one / "stdout").read_text()
    assert not (one / "runs" / "small" / "stop").exists()
    assert not (one / "runs" / "small" / "running.json").exists()


@pytest.mark.parametrize(
    ("inner", "number"),
    # On one node, the deepspeed process does not handle SIGTERM.
    [(False, signal.SIGTERM), (True, signal.SIGKILL)],
    ids=["deepspeed-term", "launch-kill"],
)
def test_ranks_save_and_leave_when_their_launcher_ends(
    config: Path, tmp_path: Path, inner: bool, number: signal.Signals
) -> None:
    runs = tmp_path / "runs"
    with started(tmp_path, launcher(config, runs, 10**6)) as job:
        wait_for_a_step(tmp_path, job)
        ranks = [rank_process(job, rank) for rank in range(2)]
        victim = ranks[0].ppid() if inner else job.pid
        os.kill(victim, number)
        assert_gone(ranks, SECONDS_TO_NOTICE_A_DEATH)
        job.wait(SECONDS_TO_NOTICE_A_DEATH)
    text = (tmp_path / "stdout").read_text()
    assert f"the launcher, pid {victim}, has ended; asked to stop: saved after step" in text
    assert list((runs / "small" / "checkpoints").glob("step_*[0-9]"))


def test_a_run_that_is_running_is_not_started_again(config: Path, tmp_path: Path) -> None:
    arguments = arguments_of(config, tmp_path / "runs", 10**6)
    with EntryPoint(tmp_path / "one", SCRIPT, *arguments) as first:
        wait_until(lambda: "step " in first.output, "a step")
        with EntryPoint(tmp_path / "other", SCRIPT, *arguments) as second:
            refused = second.wait()
        assert refused.status == 2
        assert f"already running (host {os.uname().nodename}, pid {first.pid}," in refused.errors
        assert len(refused.errors.splitlines()) == 1
        os.kill(first.pid, signal.SIGKILL)
        time.sleep(0.2)
        with EntryPoint(tmp_path / "third", SCRIPT, *arguments) as third:
            wait_until(lambda: "step " in third.output, "a step, although the first was killed")


def train_by_hand(config: Path, folder: Path, of_rank_1: str) -> tuple[Finished, Finished]:
    """Run two ranks without a launcher, with one more argument for rank 1."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    arguments = arguments_of(config, folder / "runs", 6)
    first = {**shared, "RANK": "0", "LOCAL_RANK": "0"}
    second = {**shared, "RANK": "1", "LOCAL_RANK": "1"}
    with (
        EntryPoint(folder / "0", SCRIPT, *arguments, environment=first) as rank_0,
        EntryPoint(folder / "1", SCRIPT, *arguments, of_rank_1, environment=second) as rank_1,
    ):
        return rank_0.wait(), rank_1.wait()


def test_a_mistake_on_one_rank_ends_all_ranks(config: Path, tmp_path: Path) -> None:
    finished = train_by_hand(config, tmp_path, "--set=training.lr=-1")
    assert [one.status for one in finished] == [2, 2]
    host = re.escape(os.uname().nodename)
    assert finished[0].errors == ""
    assert re.match(rf"error: rank 1 \(host {host}, pid \d+\): .*training\.lr", finished[1].errors)
    assert len(finished[1].errors.splitlines()) == 1


@pytest.mark.parametrize(
    ("setting", "key", "values"),
    [
        ("run.seed=4", "run.seed", ("3", "4")),
        ("training.train_steps=7", "training.train_steps", ("6", "7")),
        ("model.num_layers=3", "model.num_layers", ("2", "3")),
    ],
)
def test_ranks_that_disagree_are_told_so(
    config: Path, tmp_path: Path, setting: str, key: str, values: tuple[str, str]
) -> None:
    finished = train_by_hand(config, tmp_path, f"--set={setting}")
    assert [one.status for one in finished] == [2, 2]
    assert [len(one.errors.splitlines()) for one in finished] == [1, 0]
    host = os.uname().nodename
    assert (
        f"error: {key} is {values[0]} on rank 0 (host {host}) and {values[1]} on rank 1 (host"
        in finished[0].errors
    )


def test_output_that_nobody_reads_any_more_does_not_end_a_run(config: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    command = [sys.executable, SCRIPT, *arguments_of(config, runs, 10**6)]
    with started(tmp_path, ["bash", "-c", f"{' '.join(command)} | head -n 4"]) as pipe:
        shell = psutil.Process(pipe.pid)
        wait_until(lambda: (tmp_path / "stdout").read_text().count("\n") >= 4, "lines")
        (training,) = [
            process
            for process in shell.children(recursive=True)
            # "head" may have ended by now, and an ended process has no command line.
            if SCRIPT in (process.as_dict(["cmdline"])["cmdline"] or ())
        ]
        time.sleep(1)  # further lines meet the closed pipe
        training.send_signal(signal.SIGINT)
        assert_gone([training], 60)
        pipe.wait(180)
    assert (tmp_path / "stderr").read_text() == ""
    assert list((runs / "small" / "checkpoints").glob("step_*[0-9]"))


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("WORLD_SIZE", "abc", "an integer, 1 or more"),
        ("MASTER_PORT", "99999", "an integer, 1 to 65535"),
        ("RANK", "5", "an integer, 0 to 1"),
    ],
)
def test_variables_of_a_launcher_are_checked(
    config: Path, tmp_path: Path, name: str, value: str, allowed: str
) -> None:
    variables = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    variables = {**variables, "MASTER_PORT": "29500", name: value}
    arguments = arguments_of(config, tmp_path, 6)
    with EntryPoint(tmp_path, SCRIPT, *arguments, environment=variables) as running:
        finished = running.wait(180)
    assert finished.status == 2
    assert (
        finished.errors == f"error: environment variable {name} = {value!r}; allowed: {allowed}\n"
    )


def test_an_unknown_host_of_rank_0_is_said_at_once(config: Path, tmp_path: Path) -> None:
    variables = {
        "WORLD_SIZE": "2",
        "RANK": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "no.such.host.invalid",
        "MASTER_PORT": "29500",
    }
    arguments = arguments_of(config, tmp_path, 6)
    with EntryPoint(tmp_path, SCRIPT, *arguments, environment=variables) as running:
        finished = running.wait(180)
    assert finished.status == 2
    assert "rank 0's host 'no.such.host.invalid' is unknown here" in finished.errors


def check_anchored(config: Path, measurement: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An anchored forecast of the measured step is the measured time."""
    common = ["forecast", f"--config={config}", "--micro-batches=2", f"--anchor={measurement}"]
    command = [*common, "--world-size=1,4", "--machine=h100-sxm", "--json"]
    assert scaling.main(command) == 0
    (found,) = json.loads(capsys.readouterr().out)["machines"]
    (row,) = (
        row
        for row in json.loads((measurement / "scaling.json").read_text())["rows"]
        if (row["arm"], row["world_size"]) == ("model", 1)
    )
    one, four = found["forecasts"]["model"]
    assert one["step_seconds"] == pytest.approx(row["step_seconds"]["median"])
    assert sum(four["split_seconds"].values()) == pytest.approx(four["step_seconds"])
    assert "(MEASURED)" in found["anchor"]
    assert scaling.main([*command, "--machine=a100-40gb-roce"]) == 2
    assert "--anchor: belongs to one machine" in capsys.readouterr().err
    assert scaling.main([*command, "--set=model.num_layers=3"]) == 2
    assert "another model was measured: model.num_layers was 2 and is 3" in capsys.readouterr().err


def test_steps_are_timed_and_nothing_else_is_written(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["measure", f"--config={config}", "--world-size=1", "--micro-batches=2"]
    command += [
        "--arms=dense",
        "--steps=3",
        "--warmup=1",
        "--repeats=1",
        f"--output={tmp_path / 'scaling'}",
    ]
    command += [f"--set=run.directory={tmp_path / 'runs'}", "--json"]
    assert scaling.main(command) == 0
    figures = json.loads(capsys.readouterr().out)
    check_anchored(config, tmp_path / "scaling", capsys)
    assert [(row["arm"], row["world_size"]) for row in figures["rows"]] == [
        ("model", 1),
        ("dense twin", 1),
    ]
    assert all(0 < row["utilization"] < 1.5 for row in figures["rows"])
    assert not (tmp_path / "runs").exists()
    points = tmp_path / "scaling" / "points"
    one, twin = (
        json.loads((points / f"{name}-0.json").read_text()) for name in ("model-1", "dense-twin-1")
    )
    assert len(one["step_seconds"]) == 4
    assert one["micro_batches"] == 2
    # The twin does the same FLOPs on the same batches.
    assert twin["tokens"] == one["tokens"]
    assert twin["flops"] == pytest.approx(one["flops"], rel=0.01)


def test_a_calibrated_machine_can_be_forecast(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = tmp_path / "mine.toml"
    options = ["--num_accelerators", "2", "--master_port", str(free_port())]
    command = [*options, "--module", "mot_megatron.cli.scaling_calibrate", f"--config={config}"]
    with started(tmp_path, [*LAUNCHER, *command, f"--output={profile}"]) as job:
        assert job.wait(300) == 0
    machine = load_machine(profile)
    assert machine.stamps == ("MEASURED",)
    assert "launch_us" in machine.measured
    world, message = machine.groups
    assert world.axes == "data, world, node"
    assert {*world.lines} == {*COLLECTIVES}
    assert {*message.lines} == {"send"}
    common = [f"--config={config}", "--micro-batches=1", f"--machine={profile}"]
    assert scaling.main(["forecast", *common, "--world-size=2"]) == 0
    assert "(MEASURED); all times FORECAST" in capsys.readouterr().out
    assert scaling.main(["forecast", *common, "--world-size=4"]) == 2
    assert "network.gb_per_s: absent, but 4 ranks need several nodes" in capsys.readouterr().err
