"""A run that is continued from its checkpoint against one that is not, and its evaluation."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from mot_megatron.config import Config
from mot_megatron.drill.rounds import content_of
from mot_megatron.machine_check.checks import Context
from mot_megatron.machine_check.corpus import make_corpus
from mot_megatron.machine_check.jobs import JobError, run_job
from mot_megatron.machine_check.outcome import Outcome
from mot_megatron.machine_check.parity import TOLERANCES, small_config

_STEPS, _SAVED_STEP = 6, 3


def resume(context: Context) -> Outcome:
    """Train six steps, and three steps and then three more; compare checkpoints and losses.

    The losses are those that ``mot evaluate`` prints for the last checkpoints. If the weights are
    equal bit by bit, so are the losses; on a GPU, rounding may differ.
    """
    corpus = make_corpus(context.directory / "corpus").directory
    runs = context.directory / "runs"
    # An interrupted check has left runs that would be continued.
    shutil.rmtree(runs, ignore_errors=True)
    names = ("whole", "continued")
    try:
        for name, steps in ((names[0], _STEPS), (names[1], _SAVED_STEP), (names[1], _STEPS)):
            run_job(context, f"{name}-{steps}-steps", _config(runs, corpus, name, steps), 1)
        bits = _evaluate(context, [runs / name for name in names])
    except JobError as error:
        return Outcome("FAIL", str(error), "read the job's log in logs/")
    numbers = {"bits_per_token": bits}
    if content_of(runs / names[0]) == content_of(runs / names[1]):
        seen = f"{_STEPS} steps, and {_SAVED_STEP} steps that are continued: equal bit by bit"
        return Outcome("PASS", seen, "", numbers)
    difference = max(abs(bits[0][name] - bits[1][name]) for name in bits[0])
    seen = f"held-out losses differ by {difference:.1e} bits, checkpoints not equal bit by bit"
    if context.on_gpu and difference <= TOLERANCES["fp32"]:
        advice = "a run that is continued differs by rounding from one that is not"
        return Outcome("PASS", seen, advice, numbers)
    return Outcome("FAIL", seen, "do not stop and continue runs here before this is found", numbers)


def _config(runs: Path, corpus: Path, name: str, steps: int) -> Config:
    overrides = [
        f'run.directory="{runs}"',
        f'run.name="{name}"',
        f"training.train_steps={steps}",
        f"checkpoint.interval_steps={_SAVED_STEP}",
    ]
    return small_config(corpus, "plain", overrides)


def _evaluate(context: Context, runs: list[Path]) -> list[dict[str, float]]:
    """Return the held-out loss of every modality, for each run.

    Raises:
        JobError: ``mot evaluate`` failed.
    """
    checkpoints = [word for run in runs for word in ("--checkpoint", str(run))]
    finished = subprocess.run(
        [sys.executable, "-m", "mot_megatron", "evaluate", *checkpoints, "--json"],
        env=dict(context.environment),
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode:
        raise JobError(f"mot evaluate: {finished.stderr.strip().splitlines()[-1]}")
    return [
        {
            name: losses["bits_per_token"]
            for name, losses in each["as_trained"]["modalities"].items()
        }
        for each in json.loads(finished.stdout)["checkpoints"]
    ]
