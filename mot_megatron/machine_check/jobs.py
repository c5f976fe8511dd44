"""Training jobs of a check, started with the deepspeed launcher."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mot_megatron.config import Config
from mot_megatron.errors import UserError
from mot_megatron.files import write_atomically
from mot_megatron.job.local_job import Job
from mot_megatron.machine_check.checks import TIMES_SUFFIX, Context

_POLL_SECONDS = 0.5
_END_SECONDS = 30.0
_LONGEST_ERROR = 300


class JobError(UserError):
    """A job did not end well."""


def timed_job(
    context: Context, name: str, config: Config, world_size: int, synthetic: str = ""
) -> dict[str, Any]:
    """Run the steps of a configuration and return their times and losses (see ``run.timing``).

    Args:
        context: The machine.
        name: Name of the job's files.
        config: What it trains.
        world_size: Number of ranks.
        synthetic: Shares of the tokens of modalities in synthetic batches; empty for the corpus.

    Raises:
        JobError: It did not end well; in one line, with the job's own errors.
    """
    record = context.file(f"{name}{TIMES_SUFFIX}")
    record.unlink(missing_ok=True)
    arguments = [f"--benchmark={record}"]
    if synthetic:
        arguments.append(f"--synthetic={synthetic}")
    run_job(context, name, config, world_size, arguments)
    return json.loads(record.read_text())


def run_job(
    context: Context, name: str, config: Config, world_size: int, arguments: Sequence[str] = ()
) -> None:
    """Train a configuration with the deepspeed launcher, and wait for the end.

    There is no time limit but that of the check, whose end ends the job.

    Args:
        context: The machine.
        name: Name of the job's files.
        config: What it trains.
        world_size: Number of ranks.
        arguments: Further arguments of training.

    Raises:
        JobError: It did not end well; in one line, with the job's own errors.
    """
    path = context.file(f"{name}.toml")
    write_atomically(path, config.to_toml())
    output = context.file(f"{name}.job.log")
    job = Job([f"--config={path}", *arguments], world_size, output, context.environment)
    try:
        job.wait(float("inf"), poll_seconds=_POLL_SECONDS)
    finally:
        ended = job.end(_END_SECONDS if not job.is_running else 0.0)
    if ended.status != 0:
        reason = "; ".join(ended.errors) or _last_line(output)
        raise JobError(f"{output.name}: status {ended.status}: {reason[:_LONGEST_ERROR]}")


def _last_line(output: Path) -> str:
    lines = [line for line in output.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no output"
