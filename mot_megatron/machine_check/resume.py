"""A run that is continued from its checkpoint against one that is not; both are evaluated."""

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
    equal bit by bit, so are the losses; on a GPU, rounding may differ. ``mot generate`` must run.
    """
    corpus = make_corpus(context.directory / "corpus").directory
    runs = context.directory / "runs"
    # An interrupted check has left runs that would be continued.
    shutil.rmtree(runs, ignore_errors=True)
    names = ("whole", "continued")
    try:
        for name, steps in ((names[0], _STEPS), (names[1], _SAVED_STEP), (names[1], _STEPS)):
            run_job(context, f"{name}-{steps}-steps", _config(runs, corpus, name, steps), 1)
        folders = [runs / name for name in names]
        bits = _evaluate(context, folders)
        _generate(context, folders[-1])
    except JobError as error:
        return Outcome("FAIL", str(error), "read the job's log in logs/")
    numbers = {"bits_per_token": bits}
    if content_of(runs / names[0]) == content_of(runs / names[1]):
        seen = f"{_STEPS} steps, and {_SAVED_STEP} that are continued to {_STEPS}: equal bit by bit"
        return Outcome("PASS", seen, "", numbers)
    difference = max(abs(bits[0][name] - bits[1][name]) for name in bits[0])
    seen = f"held-out losses differ by {difference:.1e} bits, checkpoints not equal bit by bit"
    if context.on_gpu and difference <= TOLERANCES["fp32"]:
        advice = "a run that is continued differs by rounding from one that is not"
        return Outcome("PASS", seen, advice, numbers)
    return Outcome("FAIL", seen, "do not stop and continue runs here before this is found", numbers)


def _generate(context: Context, run: Path) -> None:
    """Continue a prompt of token ids, as long as it takes to use the key-value cache.

    Raises:
        JobError: ``mot generate`` failed.
    """
    output = context.directory / "generated"
    shutil.rmtree(output, ignore_errors=True)
    words = ["--checkpoint", str(run), "--ids", "--prompt", "1 2 4 5", "--into", "text"]
    _mot(context, "generate", *words, "--max-tokens", "16", "--output", str(output))


def _mot(context: Context, command: str, *arguments: str) -> str:
    """Run a command of ``mot`` and return what it prints.

    Raises:
        JobError: It failed; in one line.
    """
    finished = subprocess.run(
        [sys.executable, "-m", "mot_megatron", command, *arguments],
        env=dict(context.environment),
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode:
        last = (finished.stderr.strip().splitlines() or ["no message"])[-1]
        raise JobError(f"mot {command}: status {finished.returncode}: {last}")
    return finished.stdout


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
    printed = _mot(context, "evaluate", *checkpoints, "--json")
    return [
        {
            name: losses["bits_per_token"]
            for name, losses in each["as_trained"]["modalities"].items()
        }
        for each in json.loads(printed)["checkpoints"]
    ]
