"""Rounds of a drill: start or continue a run, cause a fault at a random time, check what is left.

A run is continued by the same command after every fault until it is done. Its last checkpoint must
then equal that of a run without faults, bit for bit.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mot_megatron.checkpoint import open_checkpoint
from mot_megatron.checkpoint.manifest import read_manifest
from mot_megatron.checkpoint.names import checkpoint_directory
from mot_megatron.config import Config
from mot_megatron.drill.faults import (
    CORRUPTION,
    DURING_A_JOB,
    MENDED,
    STOPS,
    damage_the_newest_checkpoint,
)
from mot_megatron.errors import CheckpointError, TrainingError
from mot_megatron.job.local_job import Ended, Job

SECONDS_TO_END = 90.0
"""How long a job may take to end after a fault."""
_DURING_START = 0.3
"""Fraction of the faults whose time is drawn from the whole job, most of which is its start. The
others are caused at a random step."""
_LONGEST_DELAY = 0.5
"""Largest random delay of a fault after its step was printed, in seconds; saves fall into it."""
_LONGEST_JOB = 10
"""A job without a fault may take this many times as long as the first."""


@dataclass(frozen=True)
class Setting:
    """What all jobs of a drill have in common."""

    config: Config
    arguments: tuple[str, ...]
    """Arguments of training, without the run's name."""
    world_size: int
    directory: Path
    environment: Mapping[str, str]
    """Environment variables of the jobs."""
    kinds: tuple[str, ...]
    """Faults to choose from, of ``faults.KINDS``."""
    is_supervised: bool = False
    """Whether jobs run under ``mot supervise``, which starts them again after most faults."""


@dataclass
class Round:
    """One job, the fault that it met, and what was wrong afterwards."""

    run: str
    fault: str
    """Kind of the fault, or "none" if the job was done before."""
    detail: str
    after_seconds: float
    """When the fault was caused, since the job's start."""
    seconds_to_end: float
    status: int | None
    fault_step: int
    """Last step that was printed before the fault; 0 before the first."""
    last_step: int
    saved_step: int
    """Step of the newest checkpoint that verifies; 0 if there is none."""
    problems: list[str] = field(default_factory=list)

    @property
    def lost_steps(self) -> int:
        """Steps done since the newest checkpoint."""
        return max(0, self.last_step - self.saved_step)


def run_rounds(
    setting: Setting, seconds: float, seed: int, say: Callable[[str], None]
) -> Iterator[Round]:
    """Yield one round after another; the first has no fault, and faults end after ``seconds``.

    The last run is continued to its end even if that takes longer.

    Raises:
        TrainingError: The job without a fault did not end well.
    """
    chance = random.Random(seed)
    say("a run without faults, for comparison")
    first, job_seconds = _undisturbed(setting, "reference")
    yield first
    if first.status != 0:
        output = setting.directory / "reference-1.txt"
        raise TrainingError(f"the run without faults ended with status {first.status}: {output}")
    wanted = content_of(setting.directory / "reference")
    deadline = time.monotonic() + seconds
    number = 0
    while time.monotonic() < deadline:
        number += 1
        name, jobs, done = f"run-{number}", 0, False
        while not done:
            jobs += 1
            limit = job_seconds if time.monotonic() < deadline else None
            result = _round(setting, name, jobs, chance, limit, _LONGEST_JOB * job_seconds)
            done = (setting.directory / name / "summary.json").exists()
            if done and content_of(setting.directory / name) != wanted:
                result.problems.append("the last checkpoint differs from that without faults")
            yield result


def _undisturbed(setting: Setting, name: str) -> tuple[Round, float]:
    job = _start(setting, name, 1)
    job.wait(3600)
    seconds = job.seconds
    return _judge(setting, name, "none", "", job, seconds, before=0), seconds


def _round(
    setting: Setting,
    name: str,
    number: int,
    chance: random.Random,
    job_seconds: float | None,
    longest: float,
) -> Round:
    """Continue the run; cause a fault unless ``job_seconds``, the length of a job, is None."""
    kind = chance.choice(setting.kinds) if job_seconds else "none"
    detail = None
    if kind == CORRUPTION:
        checkpoints = checkpoint_directory(setting.directory / name)
        detail = damage_the_newest_checkpoint(checkpoints, chance)
        kind = CORRUPTION if detail else "none"
    before = _saved_step(setting, name)
    job = _start(setting, name, number)
    if kind in DURING_A_JOB:
        assert job_seconds is not None
        if chance.random() < _DURING_START:
            job.wait(chance.uniform(0, job_seconds))
        else:
            steps = setting.config.training.train_steps
            job.wait(longest, step=chance.randint(before, steps))
            job.wait(chance.uniform(0, _LONGEST_DELAY))
        if job.is_running:
            detail = DURING_A_JOB[kind](job, setting.directory / name, chance)
        else:
            kind = "none"
    else:
        job.wait(longest)
    # A supervised job goes on after the fault.
    rest = longest if setting.is_supervised and kind in MENDED else 0.0
    return _judge(setting, name, kind, detail or "", job, job.seconds, before, rest)


def _start(setting: Setting, name: str, number: int) -> Job:
    arguments = [*setting.arguments, "--set", f"run.name={name}"]
    output = setting.directory / f"{name}-{number}.txt"
    return Job(
        arguments,
        setting.world_size,
        output,
        setting.environment,
        is_supervised=setting.is_supervised,
    )


def _judge(  # what is known about a round
    setting: Setting,
    name: str,
    kind: str,
    detail: str,
    job: Job,
    after: float,
    before: int,
    rest: float = 0.0,
) -> Round:
    """Wait for the end of a job, for ``rest`` seconds longer than a fault takes; judge it."""
    begin, step = time.monotonic(), job.step
    # A job that did not hear a stop request, or did not need the disk, runs on to its end.
    ended = job.end(SECONDS_TO_END + rest if kind != "none" else 1.0)
    saved = _saved_step(setting, name)
    result = Round(
        run=name,
        fault=kind,
        detail=detail,
        after_seconds=after,
        seconds_to_end=time.monotonic() - begin,
        status=ended.status,
        fault_step=step,
        last_step=ended.last_step,
        saved_step=saved,
    )
    result.problems += find_problems(setting, result, ended, before)
    return result


def find_problems(setting: Setting, result: Round, ended: Ended, before: int) -> list[str]:
    """Return what was wrong about a job and what it left, one sentence each.

    Args:
        setting: The drill.
        result: The round so far.
        ended: How the job ended.
        before: Step of the newest checkpoint that verified when the job began.
    """
    found = []
    if ended.status is None:
        found.append("the job did not end")
    if ended.survivors:
        found.append(f"{ended.survivors} processes outlived the launcher")
    if result.saved_step < before:
        found.append(f"the checkpoint of step {before} is lost, the newest is {result.saved_step}")
    most = _most_lost_steps(setting.config)
    if result.lost_steps > most:
        found.append(f"{result.lost_steps} steps lost, more than {most}")
    if ended.has_traceback:
        found.append("a traceback was printed")
    if len(ended.errors) > 1:
        found.append(f"{len(ended.errors)} errors were printed: {' | '.join(ended.errors)}")
    must_end_well = (*STOPS, CORRUPTION, "none", *(MENDED if setting.is_supervised else ()))
    if result.fault in must_end_well:
        if ended.status not in (0, None):
            found.append(f"ended with status {ended.status}: {' | '.join(ended.errors)}")
        if result.fault in STOPS and result.lost_steps:
            found.append(f"stopped without saving: {result.lost_steps} steps lost")
    return found


def _most_lost_steps(config: Config) -> int:
    """Return how many steps a fault may cost: a save in the background may last until the next."""
    in_background = config.checkpoint.asynchronous is not False
    return config.checkpoint.interval_steps * (2 if in_background else 1)


def _saved_step(setting: Setting, name: str) -> int:
    try:
        found = open_checkpoint(checkpoint_directory(setting.directory / name)).checkpoint
    except CheckpointError:
        return 0
    return found.step if found else 0


def content_of(run: Path) -> str:
    """Return a digest of the step and tensors of the newest checkpoint of a run's folder."""
    found = open_checkpoint(checkpoint_directory(run)).checkpoint
    assert found is not None
    files = read_manifest(found.path).files
    tensors = {file: record.sha256 for file, record in files.items() if file.endswith(".distcp")}
    return hashlib.sha256(repr((found.step, sorted(tensors.items()))).encode()).hexdigest()


def summarize(rounds: Sequence[Round]) -> list[str]:
    """Return a table of the faults, and every problem in a line of its own."""
    lines = [f"{'fault':22}{'times':>7}{'longest end':>13}{'most steps lost':>17}{'problems':>10}"]
    for kind in dict.fromkeys(each.fault for each in rounds):
        of_kind = [each for each in rounds if each.fault == kind]
        lines.append(
            f"{kind:22}{len(of_kind):7}"
            f"{max(each.seconds_to_end for each in of_kind):11.1f} s"
            f"{max(each.lost_steps for each in of_kind):17}"
            f"{sum(len(each.problems) for each in of_kind):10}"
        )
    return lines + [
        f"{each.run}, {each.fault} ({each.detail}) after {each.after_seconds:.1f} s: {problem}"
        for each in rounds
        for problem in each.problems
    ]
