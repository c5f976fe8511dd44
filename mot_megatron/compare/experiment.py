"""A comparison of arms: which runs it is made of, and what is kept of each of them when it ends.

A folder of configurations holds base.toml, which all arms share, small files that make the arms of
it, and experiment.toml, which says which arms run with which seeds. In the output folder a run's
scalars (curves/) and a record of it (records/) outlive its own folder (runs/): the report is made
of them alone. A run whose record is there has ended.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mot_megatron.compare.curves import (
    RunCurves,
    read_csv,
    read_description,
    read_identity,
    read_run,
    token_digests,
    write_csv,
)
from mot_megatron.compare.step_matching import LEAST_POINTS
from mot_megatron.config import Config, NonNegativeInt
from mot_megatron.config_files import differing_keys, load_config
from mot_megatron.data.corpus import DESCRIPTION_FILE, CorpusDescription
from mot_megatron.errors import ConfigError, DataError, Location, first_problem
from mot_megatron.files import write_atomically
from mot_megatron.run.summary import SUMMARY_FILE, has_summary

BASE_FILE = "base.toml"
EXPERIMENT_FILE = "experiment.toml"
_FROZEN = ConfigDict(frozen=True, extra="forbid")


class Arm(BaseModel):
    """One of the models that are compared."""

    model_config = _FROZEN

    files: tuple[str, ...] = Field(min_length=1)
    """Configurations that follow base.toml, in its folder."""
    seeds: tuple[NonNegativeInt, ...] = Field(min_length=1)
    """A run for each."""
    paper: dict[str, dict[str, float]] = {}
    """Slopes of the training loss in steps that the paper prints: modality -> model size."""
    paper_says: str | None = None
    """What it prints of the arm besides."""


class Experiment(BaseModel):
    """experiment.toml."""

    model_config = _FROZEN

    baseline: str
    """The arm that all others are matched against."""
    arms: dict[str, Arm]

    @property
    def order(self) -> tuple[str, ...]:
        """Names of the arms, the baseline first."""
        return (self.baseline, *(name for name in self.arms if name != self.baseline))


@dataclass(frozen=True, eq=False)
class PlannedRun:
    """An arm with a seed."""

    arm: str
    seed: int
    files: tuple[Path, ...]
    """Its configuration, later files overriding earlier ones."""
    overrides: tuple[str, ...]
    """``section.key=value``."""
    config: Config
    """What these say, resolved for the corpus."""
    corpus: CorpusDescription

    @property
    def name(self) -> str:
        """Of the run."""
        return self.config.run.name

    @property
    def arguments(self) -> list[str]:
        """Of the command line that trains it."""
        files = [part for file in self.files for part in ("--config", str(file))]
        return files + [part for override in self.overrides for part in ("--set", override)]

    @property
    def has_ended(self) -> bool:
        """Whether its last step is done and summed up, in its own folder."""
        return has_summary(self.config.run_directory, self.config.training.train_steps)


class RunRecord(BaseModel):
    """What is kept of a run beside its curves."""

    model_config = _FROZEN

    arm: str
    seed: int
    ended: str
    """Date and time, ISO 8601."""
    command: str
    """That trained it."""
    comparison: str
    """The command that it was a part of."""
    parallel: int
    """Runs side by side on the machine."""
    machine: dict[str, Any]
    corpus: dict[str, Any]
    """Its name, builder and tokens per split and modality."""
    summary: dict[str, Any]
    """Its summary.json."""
    config: Config
    """Resolved."""


@dataclass(frozen=True)
class Circumstances:
    """What the records of all runs of one start of a comparison have in common."""

    comparison: str
    parallel: int
    machine: dict[str, Any]


@dataclass(frozen=True)
class RecordedRun:
    """A run that has ended."""

    record: RunRecord
    curves: RunCurves


def load_experiment(directory: Path) -> Experiment:
    """Read experiment.toml of a folder of configurations.

    Raises:
        ConfigError: it cannot be read, or is no experiment; the line names file and key.
    """
    path = directory / EXPERIMENT_FILE
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
        experiment = Experiment.model_validate(tree)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    except ValidationError as error:
        raise ConfigError(f"{path}: {first_problem(error, _keys_at)}") from None
    if experiment.baseline not in experiment.arms:
        raise ConfigError(
            f"{path}: baseline = {experiment.baseline!r} is no arm; allowed:"
            f" {', '.join(experiment.arms)}"
        )
    for name, arm in experiment.arms.items():
        if len(set(arm.seeds)) < len(arm.seeds):
            raise ConfigError(f"{path}: arms.{name}.seeds = {list(arm.seeds)}: each may stand once")
    return experiment


def _keys_at(location: Location) -> Iterable[str]:
    """Of experiment.toml, or of an arm in it."""
    return (Arm if location else Experiment).model_fields


def plan_runs(
    directory: Path,
    output: Path,
    *,
    arms: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    overrides: Sequence[str] = (),
) -> list[PlannedRun]:
    """All runs of the experiment in the order in which they start.

    Every arm's first seed, then every arm's second, so that what has ended at any time is about as
    much of each, and the baseline's is always there.

    Args:
        directory: Folder of the configurations.
        output: Folder of the comparison.
        arms: Only these; absent: all.
        seeds: Only these of the arms' seeds; absent: all.
        overrides: Of every run's configuration.

    Raises:
        ConfigError: a configuration is not legal or its curves will be too short to be matched, or
            an arm or a seed is not in experiment.toml.
        DataError: the corpus cannot be read.
    """
    experiment = load_experiment(directory)
    chosen = _chosen(experiment, arms, seeds, directory / EXPERIMENT_FILE)
    descriptions: dict[Path, CorpusDescription] = {}
    runs = []
    for round_ in range(max(map(len, chosen.values()))):
        for name, arm_seeds in chosen.items():
            if round_ >= len(arm_seeds):
                continue
            seed = arm_seeds[round_]
            files = (BASE_FILE, *experiment.arms[name].files)
            paths = tuple(directory / file for file in files)
            own = [f"run.name={name}-s{seed}", f"run.seed={seed}", f"run.directory={output}/runs"]
            settings = (*overrides, *own)
            config = load_config(paths, list(settings))
            corpus = config.data.corpus
            if corpus not in descriptions:
                descriptions[corpus] = read_description(corpus / DESCRIPTION_FILE)
            description = descriptions[corpus]
            modalities = [modality.name for modality in description.modalities]
            resolved = config.resolved_for(modalities, description.vocab_size)
            _check_points(resolved)
            runs.append(PlannedRun(name, seed, paths, settings, resolved, description))
    return runs


def is_recorded(run: PlannedRun, output: Path) -> bool:
    """Whether the run has ended and its curves are kept.

    Raises:
        ConfigError: it, or the part of it that is done, is of another configuration.
        DataError: its record is damaged, or it was trained on another corpus.
    """
    path, curves = _record_path(output, run.name), _curves_path(output, run.name)
    if path.exists() and curves.exists():
        _check_unchanged(read_record(path).config, run, path)
        _check_same_corpus(read_identity(curves).splits, run, curves)
        return True
    directory = run.config.run_directory
    if (path := directory / "config.toml").exists():
        _check_unchanged(load_config(path), run, directory)
    if (path := directory / DESCRIPTION_FILE).exists():
        _check_same_corpus(token_digests(read_description(path)), run, path)
    return False


def record_run(
    run: PlannedRun, output: Path, circumstances: Circumstances, *, ended: str, command: str
) -> None:
    """Keep the curves and the record of a run that has ended.

    Raises:
        DataError: its log has no curves, or something cannot be written.
        ConfigError: it was trained with another configuration, as a file changed after planning.
    """
    directory = run.config.run_directory
    _check_unchanged(load_config(directory / "config.toml"), run, directory)
    summary = json.loads((directory / SUMMARY_FILE).read_text(encoding="utf-8"))
    corpus = read_description(directory / DESCRIPTION_FILE)
    record = RunRecord(
        arm=run.arm,
        seed=run.seed,
        ended=ended,
        command=command,
        comparison=circumstances.comparison,
        parallel=circumstances.parallel,
        machine=circumstances.machine,
        corpus={
            "name": corpus.name,
            "builder": corpus.builder,
            "tokens": {name: split.tokens_per_modality for name, split in corpus.splits.items()},
        },
        summary=summary,
        config=run.config,
    )
    path = _record_path(output, run.name)
    curves = _curves_path(output, run.name)
    try:
        for folder in (path.parent, curves.parent):
            folder.mkdir(parents=True, exist_ok=True)
        write_csv(read_run(directory), curves)
        # Last: where it is, the curves are.
        write_atomically(path, record.model_dump_json(indent=1) + "\n")
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}") from None


def read_record(path: Path) -> RunRecord:
    """Read what ``record_run`` wrote.

    Raises:
        DataError: it is damaged.
    """
    try:
        return RunRecord.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise DataError(f"{path}: not a run's record: {first_problem(error)}") from None


def read_records(experiment: Experiment, output: Path) -> dict[str, list[RecordedRun]]:
    """All runs that have ended, by arm in the experiment's order, the baseline's first.

    Raises:
        DataError: none of the baseline has ended, or none of another arm; a file is damaged; a run
            is of no arm; runs of an arm differ in more than their seed. The line names a file.
    """
    paths = sorted((output / "records").glob("*.json"))
    found: dict[str, list[RecordedRun]] = {name: [] for name in experiment.order}
    for path in paths:
        record = read_record(path)
        if record.arm not in found:
            raise DataError(f"{path}: arm {record.arm} is not in {EXPERIMENT_FILE}")
        of_arm = found[record.arm]
        if of_arm and (keys := differing_settings(of_arm[0].record.config, record.config)):
            raise DataError(
                f"{path}: {next(iter(keys))} is not as in {of_arm[0].curves.source.stem}; runs of"
                " one arm may differ in their seed only"
            )
        of_arm.append(RecordedRun(record, read_csv(_curves_path(output, path.stem))))
    records = {
        name: sorted(runs, key=lambda run: run.record.seed) for name, runs in found.items() if runs
    }
    if experiment.baseline not in records or len(records) == 1:
        has = ", ".join(records) or "none"
        raise DataError(
            f"{output}: nothing to compare yet: needed are runs of {experiment.baseline} and of"
            f" another arm that have ended; there are: {has}"
        )
    return records


def differing_settings(one: Config, other: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted keys, but for those of ``run``, and what either says; None for what is absent."""
    return differing_keys(one.model_dump(mode="json"), other.model_dump(mode="json"))


def _chosen(
    experiment: Experiment, arms: Sequence[str] | None, seeds: Sequence[int] | None, source: Path
) -> dict[str, list[int]]:
    """Arm -> its seeds, of those asked for."""
    for name in arms or ():
        if name not in experiment.arms:
            raise ConfigError(
                f"--arms {name}: not in {source}; allowed: {', '.join(experiment.arms)}"
            )
    chosen = {
        name: [seed for seed in experiment.arms[name].seeds if seeds is None or seed in seeds]
        for name in experiment.order
        if arms is None or name in arms
    }
    for seed in seeds or ():
        if not any(seed in of_arm for of_arm in chosen.values()):
            raise ConfigError(f"--seeds {seed}: no chosen arm has it in {source}")
    return {name: of_arm for name, of_arm in chosen.items() if of_arm}


def _check_points(config: Config) -> None:
    """Check that a run's curves will have points enough, before it is trained."""
    steps = config.training.train_steps
    for key, interval, what in (
        ("logging.interval_steps", config.logging.interval_steps, "reports"),
        ("evaluation.interval_steps", config.evaluation.interval_steps, "evaluations"),
    ):
        if steps // interval < LEAST_POINTS:
            raise ConfigError(
                f"{key} = {interval}: {config.run.name} comes to {steps // interval} {what} in"
                f" training.train_steps = {steps}; needed to match steps: at least {LEAST_POINTS}"
            )


def _record_path(output: Path, name: str) -> Path:
    return output / "records" / f"{name}.json"


def _curves_path(output: Path, name: str) -> Path:
    return output / "curves" / f"{name}.csv"


def _check_same_corpus(trained_on: Mapping[str, str], run: PlannedRun, source: Path) -> None:
    if trained_on != token_digests(run.corpus):
        raise DataError(
            f"{source}: was trained on other tokens than {run.config.data.corpus} now holds; move"
            " it away or choose another --output"
        )


def _check_unchanged(before: Config, run: PlannedRun, source: Path) -> None:
    differing = differing_settings(before, run.config)
    if differing:
        key, (old, new) = next(iter(differing.items()))
        files = " + ".join(str(file) for file in run.files)
        raise ConfigError(
            f"{source}: was run with {key} = {old!r}, but {files} now say {new!r}; move it away or"
            " choose another --output"
        )
