"""Runs side by side, with a fake trainer: order, logs, failures, stops, the lock."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mot_megatron.compare.experiment import PlannedRun
from mot_megatron.compare.runs import (
    Launch,
    last_error,
    sole_user,
    steps_done,
    train_all,
)
from mot_megatron.errors import DataError
from tests.compare.small_comparison import plan

# Finishes at once, unless its folder has a file "slow": then it stops early at SIGTERM. With a file
# "late" it finishes at SIGTERM, like a run whose last step is already done.
TRAINER = """
import json, pathlib, signal, sys, time
settings = dict(word.split("=", 1) for word in sys.argv if "=" in word)
name, folder = settings["run.name"], pathlib.Path(settings["run.directory"])
here = pathlib.Path(__file__).parent
with (here / "order").open("a") as order:
    order.write(name + "\\n")
if (here / "slow").exists():
    def leave(*_):
        print("asked to stop: saved")
        sys.exit(0)
    signal.signal(signal.SIGTERM, leave)
    print("step  3/9 | text 3.0 bits", flush=True)
    time.sleep(60)
if (here / "late").exists():
    signal.signal(signal.SIGTERM, lambda *_: None)
    print("step  3/9 | text 3.0 bits", flush=True)
    signal.pause()
if name == "pair-s1":
    print("Traceback of a kind\\nerror: the loss of text is not finite\\nand a warning")
    sys.exit(2)
if name == "mot-s2":
    sys.exit(0)
(folder / name).mkdir(parents=True, exist_ok=True)
(folder / name / "summary.json").write_text(json.dumps({"steps": 1500}))
print("step 1500/1500 | text 3.0 bits")
"""


class Workshop:
    """A small comparison and the fake trainer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs = plan(folder)
        (folder / "trainer.py").write_text(TRAINER)
        self.launch = Launch(
            [sys.executable, str(folder / "trainer.py")], dict(os.environ), folder / "logs", 2
        )
        self.ended: list[str] = []

    def on_end(self, run: PlannedRun) -> None:
        self.ended.append(run.name)

    def started(self) -> list[str]:
        path = self.folder / "order"
        return path.read_text().split() if path.exists() else []


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


def test_other_runs_continue_after_a_failure(
    shop: Workshop, capfd: pytest.CaptureFixture[str]
) -> None:
    with sole_user(shop.folder / "out") as lock:
        outcome = train_all(shop.runs[1:], shop.runs[:1], shop.launch, lock, shop.on_end)
    assert not outcome.stopped
    assert set(shop.ended) == {"mot-s1", "dense-s2"}
    assert sorted(shop.started()) == ["dense-s2", "mot-s1", "mot-s2", "pair-s1"]
    assert set(shop.started()[:2]) == {"pair-s1", "mot-s1"}  # two at a time, in order
    log = shop.folder / "logs" / "pair-s1.log"
    failures = sorted(outcome.failures)
    assert failures == [
        f"mot-s2 failed: stopped before its last step (console in {shop.folder}/logs/mot-s2.log)",
        f"pair-s1 failed: status 2: error: the loss of text is not finite (console in {log})",
    ]
    printed = capfd.readouterr().out
    assert "mot-s1: started" in printed
    assert "done, 3 of 5 runs" in printed
    assert log.read_text().startswith(f"$ {sys.executable} ")


def test_a_run_that_cannot_be_recorded_has_failed(shop: Workshop) -> None:
    def on_end(run: PlannedRun) -> None:
        raise DataError(f"{run.name}: no points")

    with sole_user(shop.folder / "out") as lock:
        outcome = train_all(shop.runs[:1], [], shop.launch, lock, on_end)
    (failure,) = outcome.failures
    assert failure.startswith("dense-s1 failed: dense-s1: no points (console in ")


@contextlib.contextmanager
def stopped_at_step_3(shop: Workshop, names: list[str], number: signal.Signals) -> Iterator[None]:
    """Send this process a signal when the named runs have reached step 3."""

    def stop() -> None:
        logs = [shop.folder / "logs" / f"{name}.log" for name in names]
        deadline = time.monotonic() + 30
        while any(steps_done(log) != 3 for log in logs) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    # The tests may have been started with the signal ignored; it would then have no effect.
    original = signal.signal(number, signal.default_int_handler)
    thread = threading.Thread(target=stop)
    thread.start()
    yield
    thread.join()
    signal.signal(number, original)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_is_passed_on_and_unfinished_runs_continue_later(
    shop: Workshop, number: signal.Signals
) -> None:
    slow = shop.folder / "slow"
    slow.touch()
    begun = time.monotonic()
    with sole_user(shop.folder / "out") as lock:
        with stopped_at_step_3(shop, ["dense-s1", "pair-s1"], number):
            outcome = train_all(shop.runs, [], shop.launch, lock, shop.on_end)
        assert outcome.stopped
        assert not outcome.failures
        assert not shop.ended
        assert sorted(shop.started()) == ["dense-s1", "pair-s1"]  # none started after the stop
        assert "asked to stop: saved" in shop.launch.log(shop.runs[0]).read_text()
        slow.unlink()
        train_all(shop.runs[:1], [], shop.launch, lock, shop.on_end)
    assert shop.ended == ["dense-s1"]
    assert time.monotonic() - begun < 40


@pytest.mark.parametrize("left", [True, False])
def test_runs_that_finish_despite_a_stop_are_recorded(shop: Workshop, left: bool) -> None:
    (shop.folder / "late").touch()
    names = ["dense-s1", "mot-s1"]
    runs = [run for run in shop.runs if run.name in (*names, *(["dense-s2"] if left else []))]
    with sole_user(shop.folder / "out") as lock, stopped_at_step_3(shop, names, signal.SIGTERM):
        outcome = train_all(runs, [], shop.launch, lock, shop.on_end)
    assert sorted(shop.ended) == names
    assert not outcome.failures
    assert outcome.stopped == left


def test_a_folder_is_locked_while_a_comparison_or_its_runs_use_it(tmp_path: Path) -> None:
    with sole_user(tmp_path) as lock:
        with pytest.raises(DataError, match="another comparison"), sole_user(tmp_path):
            pass
        orphan = subprocess.Popen(["sleep", "60"], pass_fds=(lock,))
    try:
        with pytest.raises(DataError, match="a run it left behind"), sole_user(tmp_path):
            pass
    finally:
        orphan.kill()
        orphan.wait()
    with sole_user(tmp_path):
        pass


def test_steps_and_errors_are_read_from_logs(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert steps_done(log) == 0
    log.write_text("step   10/1500 | text\nheld out, step   20/1500: x\nsome step 30/9\n")
    assert steps_done(log) == 10
    log.write_text("x" * 100_000 + "\nstep 1490/1500 |\nerror: one\nerror: two\nnoise\n\n")
    assert steps_done(log) == 1490
    assert last_error(log) == "error: two"
    log.write_text("Segmentation fault\n")
    assert last_error(log) == "Segmentation fault"
    log.write_text("")
    assert last_error(log) == "no console output"
