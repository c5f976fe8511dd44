"""Measurement of scaling: timed training jobs on growing numbers of GPUs, several times each."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from mot_megatron.config import Config
from mot_megatron.errors import ConfigError, DataError
from mot_megatron.files import read_regular_file, write_atomically
from mot_megatron.job.hosts import Hosts
from mot_megatron.job.local_job import Job

DESCRIPTION_FILE = "measurement.json"
_POLL_SECONDS = 2.0
"""How often to look for the end of a job; looking takes time from ranks on the CPU."""
_END_SECONDS = 60.0
"""How long the processes of a job may take to end after its launcher."""


@dataclass(frozen=True)
class Point:
    """One training job of a measurement."""

    arm: str
    world_size: int
    repeat: int

    @property
    def name(self) -> str:
        """Stem of the point's files."""
        return f"{self.arm.replace(' ', '-')}-{self.world_size}-{self.repeat}"


@dataclass(frozen=True)
class Setting:
    """What is measured."""

    configs: Mapping[str, Mapping[int, Config]]
    """Resolved configuration by arm and number of ranks."""
    warmup: int
    """First steps of a job, which do not count."""
    steps: int
    """Steps that count."""
    repeats: int
    weak: bool
    """Whether the tokens per rank are fixed (weak scaling), or the global batch (strong)."""
    directory: Path
    environment: Mapping[str, str]
    job_seconds: float
    """How long a job may take."""
    hosts: Hosts | None = None
    """Machines of the jobs; None for this one alone."""
    checkouts: Mapping[str, Path] = field(default_factory=dict)
    """Folder of the package that the jobs of an arm import; the other arms import this one."""
    synthetic: str = ""
    """Shares of the tokens of modalities in synthetic batches; empty for the corpus."""

    def points(self) -> list[Point]:
        """Return the jobs in their order, in which arms and sizes alternate."""
        return [
            Point(arm, size, repeat)
            for repeat in range(self.repeats)
            for size in next(iter(self.configs.values()))
            for arm in self.configs
        ]

    def description(self) -> dict[str, Any]:
        """Return what must be the same when a measurement is continued."""
        return {
            "weak": self.weak,
            "warmup": self.warmup,
            "steps": self.steps,
            "synthetic": self.synthetic,
            **({"checkouts": checkouts} if (checkouts := self._checkouts()) else {}),
            "arms": {
                arm: {
                    str(size): config.model_dump(mode="json", exclude={"run"})
                    for size, config in sizes.items()
                }
                for arm, sizes in self.configs.items()
            },
        }

    def _checkouts(self) -> dict[str, str]:
        return {arm: str(path) for arm, path in self.checkouts.items()}


def prepare(setting: Setting) -> None:
    """Create the folder of a measurement, or check that it holds the same one.

    Raises:
        DataError: The folder cannot be written, or is not empty and holds no measurement.
        ConfigError: It holds another measurement.
    """
    path = setting.directory / DESCRIPTION_FILE
    wanted = json.loads(json.dumps(setting.description()))
    try:
        if path.exists():
            found = json.loads(read_regular_file(path))
            wanted = _merged(path, found, wanted)
        elif setting.directory.exists() and any(setting.directory.iterdir()):
            raise DataError(f"{setting.directory}: not empty, and holds no measurement")
        (setting.directory / "points").mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(wanted, indent=1) + "\n")
    except OSError as error:
        raise DataError(f"{setting.directory}: cannot be written: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not written by mot benchmark scaling measure: {error}") from None


def _merged(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """Return the description of a measurement to which arms and numbers of ranks are added.

    Raises:
        ConfigError: The two differ in something else.
    """
    arms = {arm: {**sizes} for arm, sizes in found["arms"].items()}
    same = {**found, "arms": None} == {**wanted, "arms": None}
    for arm, sizes in wanted["arms"].items():
        known = arms.setdefault(arm, {})
        same = same and all(known.get(size, config) == config for size, config in sizes.items())
        known.update(sizes)
    if not same:
        raise ConfigError(
            f"{path}: another measurement (other configuration, steps or kind of scaling); choose"
            " a new --output"
        )
    return {**wanted, "arms": arms}


def measure(setting: Setting, say: Callable[[str], None]) -> Iterator[Point]:
    """Run the jobs that have no record yet, and yield each when its record is written.

    A job that fails is recorded with its reason, and is run again by the next call.
    """
    points = setting.points()
    for number, point in enumerate(points, 1):
        record = setting.directory / "points" / f"{point.name}.json"
        if record.exists() and "error" not in json.loads(record.read_text()):
            continue
        say(f"{number}/{len(points)}: {point.name}")
        error = _run(setting, point, record)
        if error:
            write_atomically(record, json.dumps({"error": error}) + "\n")
            say(f"{point.name} failed: {error}")
        yield point


def _run(setting: Setting, point: Point, record: Path) -> str | None:
    """Run the job of a point; return the reason if it fails."""
    config = setting.configs[point.arm][point.world_size]
    training = config.training.model_copy(update={"train_steps": setting.warmup + setting.steps})
    path = record.with_suffix(".toml")
    config = config.model_copy(update={"training": training})
    # Without the defaults, because another checkout need not know all keys.
    keys = config.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    write_atomically(path, tomli_w.dumps(keys))
    record.unlink(missing_ok=True)
    arguments = [f"--config={path}", f"--benchmark={record}"]
    if setting.synthetic:
        arguments.append(f"--synthetic={setting.synthetic}")
    checkout = setting.checkouts.get(point.arm)
    environment = dict(setting.environment)
    if checkout is not None:
        environment["PYTHONPATH"] = str(checkout)
    job = Job(
        arguments,
        point.world_size,
        record.with_suffix(".log"),
        environment,
        setting.hosts,
        directory=checkout,
    )
    try:
        timed_out = not job.wait(setting.job_seconds, poll_seconds=_POLL_SECONDS)
    finally:
        # After Ctrl-C as well, no process may go on.
        ended = job.end(_END_SECONDS if not job.is_running else 0.0)
    if timed_out:
        return f"did not end within {setting.job_seconds:.0f} s"
    if ended.status != 0 or not record.exists():
        return "; ".join(ended.errors) or f"status {ended.status}; see {job.output.name}"
    return None


def read_records(directory: Path) -> tuple[dict[str, Any], dict[Point, dict[str, Any]]]:
    """Return the description of a measurement and the records of its points.

    Raises:
        DataError: The folder holds no measurement, or a file of it cannot be read.
    """
    path = directory / DESCRIPTION_FILE
    found: dict[Point, dict[str, Any]] = {}
    try:
        description = json.loads(read_regular_file(path))
        for arm, sizes in description["arms"].items():
            for size in sizes:
                number = 0
                while (
                    path := directory / "points" / f"{Point(arm, int(size), number).name}.json"
                ).exists():
                    found[Point(arm, int(size), number)] = json.loads(read_regular_file(path))
                    number += 1
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; not the folder of a measurement?") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not written by mot benchmark scaling measure: {error}") from None
    return description, found
