"""A comparison of arms: the runs it consists of, and the records stored when they end.

A folder of configurations contains base.toml, which all arms share, small files that turn it into
the arms, and experiment.toml, which says which arms run with which seeds. The output folder has the
folder of each run (runs/), and for each run that has ended its scalars (curves/) and a record
(records/). The report needs only curves/ and records/, so runs/ may be deleted. A run with a record
has ended.
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
from mot_megatron.config import Config
from mot_megatron.config_files import as_arguments, differing_keys, load_config
from mot_megatron.config_section import NonNegativeInt
from mot_megatron.data.blend import open_training_data
from mot_megatron.data.corpus import DESCRIPTION_FILE, CorpusDescription
from mot_megatron.errors import ConfigError, DataError, Location, first_problem
from mot_megatron.files import write_atomically
from mot_megatron.run.summary import SUMMARY_FILE, has_summary

BASE_FILE = "base.toml"
EXPERIMENT_FILE = "experiment.toml"
_FROZEN = ConfigDict(frozen=True, extra="forbid")


class Arm(BaseModel):
    """One of the models compared, trained with one or several seeds."""

    model_config = _FROZEN

    files: tuple[str, ...] = Field(min_length=1)
    """Configuration files applied after base.toml, in its folder."""
    seeds: tuple[NonNegativeInt, ...] = Field(min_length=1)
    """Seeds; there is one run for each."""
    paper: dict[str, dict[str, float]] = {}
    """The paper's slopes of the training loss in steps: modality -> model size -> slope."""
    paper_says: str | None = None
    """Other results of the paper for this arm, in words."""


class Experiment(BaseModel):
    """The contents of experiment.toml."""

    model_config = _FROZEN

    baseline: str
    """Name of the arm that all others are matched against."""
    arms: dict[str, Arm]

    @property
    def order(self) -> tuple[str, ...]:
        """Names of the arms, the baseline first."""
        return (self.baseline, *(name for name in self.arms if name != self.baseline))


@dataclass(frozen=True, eq=False)
class PlannedRun:
    """A run to train: an arm with a seed."""

    arm: str
    seed: int
    files: tuple[Path, ...]
    """Configuration files; later ones override earlier ones."""
    overrides: tuple[str, ...]
    """Overrides of the configuration, ``section.key=value``."""
    config: Config
    """Configuration of files and overrides, resolved for the corpus."""
    corpus: CorpusDescription

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.config.run.name

    @property
    def arguments(self) -> list[str]:
        """Arguments of the training command."""
        files = [part for file in self.files for part in ("--config", str(file))]
        return files + [part for override in self.overrides for part in as_arguments(override)]

    @property
    def has_ended(self) -> bool:
        """Whether its own folder has the summary of its last step."""
        return has_summary(self.config.run_directory, self.config.training.train_steps)


class RunRecord(BaseModel):
    """What is stored about a run besides its curves."""

    model_config = _FROZEN

    arm: str
    seed: int
    ended: str
    """Date and time at which the run ended, ISO 8601."""
    command: str
    """Command that trained the run."""
    comparison: str
    """Command of the comparison that started the run."""
    parallel: int
    """Maximum number of runs at a time on the machine."""
    machine: dict[str, Any]
    corpus: dict[str, Any]
    """Name and builder of the corpus, and its tokens per split and modality."""
    summary: dict[str, Any]
    """Contents of the run's summary.json."""
    config: Config
    """Configuration of the run, resolved for the corpus."""


@dataclass(frozen=True)
class Circumstances:
    """The fields of RunRecord that are the same for all runs of one ``mot compare`` command."""

    comparison: str
    parallel: int
    machine: dict[str, Any]


@dataclass(frozen=True)
class RecordedRun:
    """A run that has ended: its record and curves."""

    record: RunRecord
    curves: RunCurves


def load_experiment(directory: Path) -> Experiment:
    """Read the experiment.toml of a folder of configurations.

    Raises:
        ConfigError: It cannot be read or is invalid; the message names file and key.
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
            f"{path}: baseline = {experiment.baseline!r} is not an arm; allowed:"
            f" {', '.join(experiment.arms)}"
        )
    for name, arm in experiment.arms.items():
        if len(set(arm.seeds)) < len(arm.seeds):
            raise ConfigError(f"{path}: arms.{name}.seeds = {list(arm.seeds)}: seeds must differ")
    return experiment


def _keys_at(location: Location) -> Iterable[str]:
    """Return the keys allowed at the top of experiment.toml or in an arm."""
    return (Arm if location else Experiment).model_fields


def plan_runs(
    directory: Path,
    output: Path,
    *,
    arms: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    overrides: Sequence[str] = (),
) -> list[PlannedRun]:
    """Return all runs of the experiment in the order in which they start.

    All arms' first seeds come first, then all arms' second seeds, with the baseline first in each
    round. At any time, each arm then has about as many finished runs, and the baseline has some.

    Args:
        directory: Folder of the configurations.
        output: Output folder of the comparison.
        arms: Names of the arms to run; None: all.
        seeds: Seeds to run, of those the arms have; None: all.
        overrides: Overrides of every run's configuration, ``section.key=value``.

    Raises:
        ConfigError: A configuration is invalid or its curves would be too short to be matched, or
            an arm or a seed is not in experiment.toml.
        DataError: The corpus cannot be read.
    """
    experiment = load_experiment(directory)
    chosen = _chosen(experiment, arms, seeds, directory / EXPERIMENT_FILE)
    descriptions: dict[str, CorpusDescription] = {}
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
            key = config.data.model_dump_json(include={"corpus", "sources"})
            if key not in descriptions:
                descriptions[key] = _describe_data(config)
            description = descriptions[key]
            modalities = [modality.name for modality in description.modalities]
            resolved = config.resolved_for(
                modalities, description.vocab_size, description.continuous
            )
            _check_points(resolved)
            runs.append(PlannedRun(name, seed, paths, settings, resolved, description))
    return runs


def _describe_data(config: Config) -> CorpusDescription:
    folder, *others = config.data.folders
    if others:
        return open_training_data(config.data, documents=False).description
    return read_description(folder / DESCRIPTION_FILE)


def is_recorded(run: PlannedRun, output: Path) -> bool:
    """Return whether the run has ended and its record and curves are stored.

    Raises:
        ConfigError: The run has ended or started with another configuration.
        DataError: Its record is damaged, or it was trained on another corpus.
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
    """Store the curves and the record of a run that has ended.

    Raises:
        DataError: Its log has no curves, or a file cannot be written.
        ConfigError: It was trained with another configuration: a file changed after planning.
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
        # Written last, so a run with a record always has its curves.
        write_atomically(path, record.model_dump_json(indent=1) + "\n")
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}") from None


def read_record(path: Path) -> RunRecord:
    """Read a record that ``record_run`` wrote.

    Raises:
        DataError: It is damaged.
    """
    try:
        return RunRecord.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise DataError(f"{path}: not a run's record: {first_problem(error)}") from None


def read_records(experiment: Experiment, output: Path) -> dict[str, list[RecordedRun]]:
    """Read all runs that have ended, by arm: the baseline first, then in the experiment's order.

    Raises:
        DataError: No run of the baseline has ended, or none of another arm; a file is damaged; a
            run's arm is not in the experiment; runs of an arm differ in more than their seed. The
            message names a file or folder.
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
                f"{path}: {next(iter(keys))} differs from {of_arm[0].curves.source.stem}; runs of"
                " one arm may differ only in their seed"
            )
        of_arm.append(RecordedRun(record, read_csv(_curves_path(output, path.stem))))
    records = {
        name: sorted(runs, key=lambda run: run.record.seed) for name, runs in found.items() if runs
    }
    if experiment.baseline not in records or len(records) == 1:
        has = ", ".join(records) or "none"
        raise DataError(
            f"{output}: nothing to compare yet: the report needs finished runs of"
            f" {experiment.baseline} and of another arm; there are finished runs of: {has}"
        )
    return records


def differing_settings(one: Config, other: Config) -> dict[str, tuple[Any, Any]]:
    """Return the dotted keys that differ, without ``run``, and both values; None if absent."""
    return differing_keys(one.model_dump(mode="json"), other.model_dump(mode="json"))


def _chosen(
    experiment: Experiment, arms: Sequence[str] | None, seeds: Sequence[int] | None, source: Path
) -> dict[str, list[int]]:
    """Return the chosen arms with their chosen seeds."""
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
            raise ConfigError(f"--seeds {seed}: no chosen arm has this seed in {source}")
    return {name: of_arm for name, of_arm in chosen.items() if of_arm}


def _check_points(config: Config) -> None:
    """Check, before a run is trained, that its curves will have enough points."""
    steps = config.training.train_steps
    for key, interval, what in (
        ("logging.interval_steps", config.logging.interval_steps, "reports"),
        ("evaluation.interval_steps", config.evaluation.interval_steps, "evaluations"),
    ):
        if steps // interval < LEAST_POINTS:
            raise ConfigError(
                f"{key} = {interval}: {config.run.name} has {steps // interval} {what} in"
                f" training.train_steps = {steps}; step matching needs at least {LEAST_POINTS}"
            )


def _record_path(output: Path, name: str) -> Path:
    return output / "records" / f"{name}.json"


def _curves_path(output: Path, name: str) -> Path:
    return output / "curves" / f"{name}.csv"


def _check_same_corpus(trained_on: Mapping[str, str], run: PlannedRun, source: Path) -> None:
    if trained_on != token_digests(run.corpus):
        raise DataError(
            f"{source}: was trained on other tokens than {run.config.data.places} now contains;"
            " move it away or choose another --output"
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
