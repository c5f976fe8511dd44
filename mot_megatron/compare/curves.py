"""The loss curves of a run, read from its TensorBoard log and stored as a small CSV file.

A curve is the loss of one modality on one split, with one point per report or evaluation. A
``train`` point averages over the steps since the previous report. ``held_out`` is the loss on the
validation split with tokens routed as in training. ``held_out_causal`` is the same loss with causal
routing; it is logged only for models whose training routes with later tokens.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Literal

import numpy as np
from google.protobuf.message import DecodeError
from pydantic import BaseModel, ConfigDict, ValidationError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import masked_crc32c

from mot_megatron.config import Config
from mot_megatron.config_files import load_config
from mot_megatron.config_model import BITS_PER_TOKEN
from mot_megatron.data.corpus import (
    DESCRIPTION_FILE,
    CorpusDescription,
    SplitCounts,
    parse_description,
)
from mot_megatron.errors import DataError, first_problem
from mot_megatron.files import regular_file_size
from mot_megatron.model.flops import count_parameters

Split = Literal["train", "held_out", "held_out_causal"]
Axis = Literal["steps", "flops", "seconds"]
SPLITS: tuple[Split, ...] = ("train", "held_out", "held_out_causal")
AXES: tuple[Axis, ...] = ("steps", "flops", "seconds")
SPLIT_TITLES: dict[Split, str] = {
    "train": "training loss",
    "held_out": "held-out loss, routed as in training",
    "held_out_causal": "held-out loss, routed causally",
}
"""Display names of the splits."""

_LOSS = "loss_"
_PROGRESS = ("tokens", "flops", "seconds")
# 0 loads all scalars; 1 is the smallest limit for the other kinds, which are not used.
_SIZES = {"scalars": 0, "images": 1, "audio": 1, "tensors": 1}
_RECORD_HEAD, _RECORD_FRAME = 12, 16
"""Bytes of an event file's record before its content (length and checksum), and bytes added in all
(length and two checksums)."""
_LONGEST_RECORD = 2**28
"""Bytes of the longest record that is read; a picture or sound has at most some MB."""

_MUST_BE_EQUAL = {
    "data.seq_length": "seq_length",
    "evaluation.max_sequences": "held_out_sequences",
}
"""Keys that decide which labels a loss averages over, and their fields in RunIdentity."""
_WARN_IF_DIFFERENT = {
    "training.global_batch_size": "step_sequences",
    "training.train_steps": "train_steps",
}
"""Keys that change the size of a step or the learning-rate schedule, and their fields."""

Points = dict[int, float]
"""Step -> value."""


class RunIdentity(BaseModel):
    """What identifies a run: decides which runs are comparable and which are seeds of one arm."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """``run.name``."""
    seed: int
    """``run.seed``."""
    corpus: str
    """Name of the corpus."""
    splits: dict[str, str]
    """Split name -> digest of its documents, from ``token_digests``."""
    vocabulary: tuple[str, ...]
    """Name, number of ids and codec of each modality, in the order of the ids."""
    towers: tuple[str, ...]
    """Names of the towers; a dense model has one."""
    parameters: int
    """Parameters of the whole model, without causal routers, which are trained separately."""
    sees_the_future: bool
    """Whether a token's experts depend on later tokens in ``train`` and ``held_out``."""
    pool_sequences: int | None
    """Sequences pooled in one routing decision; None if routing does not see later tokens."""
    seq_length: int
    """Tokens per packed sequence."""
    held_out_sequences: int | None
    """Validation sequences in every evaluation but the last; None: all."""
    step_sequences: int
    """Sequences in the global batch of a step."""
    train_steps: int
    """Number of steps the run is configured for."""
    loss_units: dict[str, str] = {}
    """Units of losses by modality, except of those in bits per token."""
    configuration: str
    """sha256 of the configuration without run.name, run.seed and run.directory; the same for all
    runs of an arm."""


@dataclass(frozen=True)
class Curve:
    """Loss of one modality on one split."""

    steps: np.ndarray
    """[n] int64, ascending: steps completed."""
    losses: np.ndarray
    """[n] float64, in the unit of the modality's objective."""
    averaged: bool = False
    """Whether a point is a mean over the steps since the previous point, as training losses are."""


@dataclass(frozen=True)
class RunCurves:
    """All loss curves of one run."""

    source: Path
    """The run's folder or the CSV, for error messages."""
    identity: RunIdentity
    curves: Mapping[tuple[Split, str], Curve]
    """(split, modality) -> its curve; has no entry if nothing was logged."""
    steps: np.ndarray
    """[m] int64, ascending: union of the steps of all curves."""
    tokens: np.ndarray
    """[m] cumulative document tokens trained on, over all ranks."""
    flops: np.ndarray
    """[m] cumulative model FLOPs, over all ranks."""
    seconds: np.ndarray
    """[m] cumulative seconds spent in training steps."""

    @property
    def has_ended(self) -> bool:
        """Whether the last logged step is within one report interval of the configured last step.

        The final steps of a run need not fill an interval.
        """
        interval = int(np.diff(self.steps).max(initial=0))
        return self.steps[-1] + interval >= self.identity.train_steps

    @property
    def report_interval(self) -> int:
        """Steps between two points of the training loss; 0 without two points."""
        curves = (curve for (split, _), curve in self.curves.items() if split == "train")
        return max(
            (int(np.median(np.diff(c.steps))) for c in curves if len(c.steps) > 1), default=0
        )

    @property
    def without_honest_loss(self) -> bool:
        """Whether routing sees later tokens and no loss with causal routing was logged."""
        known = any(split == "held_out_causal" for split, _ in self.curves)
        return self.identity.sees_the_future and not known

    def curve(self, split: Split, modality: str) -> Curve | None:
        """Return the curve, or None if nothing was logged for it.

        If the model's routing never sees later tokens, ``held_out_causal`` is ``held_out``.
        """
        if split == "held_out_causal" and not self.identity.sees_the_future:
            split = "held_out"
        return self.curves.get((split, modality))

    def unit(self, modality: str) -> str:
        """Return the unit of the losses of a modality."""
        return self.identity.loss_units.get(modality, BITS_PER_TOKEN.name)

    def along(self, curve: Curve, axis: Axis) -> np.ndarray:
        """Return the positions on ``axis`` of the points of a curve of this run, [n] float64.

        A point that is a mean over several steps is in the middle of them. At their end, it would
        be a trailing mean, which biases slopes by an amount that grows with the logging interval.
        """
        if axis == "steps":
            values = curve.steps.astype(np.float64)
        else:
            values = self.flops if axis == "flops" else self.seconds
            values = values[np.searchsorted(self.steps, curve.steps)]
        if not curve.averaged:
            return values
        # The mean of the last n of some steps, evenly spaced, is (n - 1) / 2 steps before the last.
        n = np.diff(curve.steps, prepend=0)
        return values - np.diff(values, prepend=0.0) * (n - 1) / (2 * n)


def read_run(directory: Path) -> RunCurves:
    """Read the curves of a run's folder: its config.toml, corpus.toml and tensorboard/.

    If a resumed run repeated steps, their last values count.

    Raises:
        DataError: A file or a curve is missing or damaged; the message names it.
        ConfigError: config.toml is missing or invalid.
    """
    config = load_config(directory / "config.toml")
    identity = _identity(config, read_description(directory / DESCRIPTION_FILE))
    scalars = _read_scalars(directory / "tensorboard")
    losses: dict[tuple[Split, str], Points] = {
        (split, modality): points
        for split in SPLITS
        for modality in config.model.modalities
        if (points := scalars.get(f"{_LOSS}{split}/{modality}"))
    }
    for split in ("train", "held_out"):
        if not any(split == found for found, _ in losses):
            raise DataError(
                f"{directory}: no points of {_LOSS}{split} in tensorboard/; has the run reached"
                " its first report and evaluation?"
            )
    progress = {name: scalars.get(f"progress/{name}", {}) for name in _PROGRESS}
    return _assemble(directory, identity, losses, progress)


def write_csv(curves: RunCurves, path: Path) -> None:
    """Write the curves to ``path`` and the run's identity to ``path.with_suffix(".json")``.

    The CSV file has one row per logged step: step, tokens, flops, seconds, and one column per
    curve, named by its TensorBoard tag. A cell is empty if the curve has no point at that step.
    Nine significant digits restore the float32 values of a TensorBoard log exactly.

    Raises:
        OSError: A file cannot be written.
    """
    points = {
        key: dict(zip(curve.steps.tolist(), curve.losses.tolist(), strict=True))
        for key, curve in curves.curves.items()
    }
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        names = [f"{_LOSS}{split}/{modality}" for split, modality in points]
        writer.writerow(["step", *_PROGRESS, *names])
        columns = (curves.steps.tolist(), curves.tokens, curves.flops, curves.seconds)
        for step, *progress in zip(*columns, strict=True):
            losses = (of_curve.get(step) for of_curve in points.values())
            cells = ("" if value is None else f"{value:.9g}" for value in (*progress, *losses))
            writer.writerow([step, *cells])
    absent = None if curves.identity.loss_units else {"loss_units"}
    text = json.dumps(curves.identity.model_dump(mode="json", exclude=absent), indent=1)
    path.with_suffix(".json").write_text(text + "\n", encoding="utf-8")


def read_csv(path: Path) -> RunCurves:
    """Read the files that ``write_csv`` wrote.

    Raises:
        DataError: A file is missing or was not written by ``write_csv``; the message names it.
    """
    identity = read_identity(path)
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            header, *rows = csv.reader(stream)
        steps = [int(row[0]) for row in rows]
        table = [[_number(cell) for cell in row] for row in rows]
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}") from None
    except (ValueError, IndexError) as error:
        raise DataError(f"{path}: not a table of curves: {error}") from None
    if header[:4] != ["step", *_PROGRESS] or any(len(row) != len(header) for row in rows):
        raise DataError(f"{path}: not a table of curves: unexpected columns")
    columns = {
        name: {
            step: row[number]
            for step, row in zip(steps, table, strict=True)
            if not np.isnan(row[number])
        }
        for number, name in enumerate(header)
        if number > 0
    }
    losses = {_parse_tag(name, path): columns[name] for name in header[4:]}
    return _assemble(path, identity, losses, {name: columns[name] for name in _PROGRESS})


def read_identity(path: Path) -> RunIdentity:
    """Read the identity that ``write_csv`` wrote beside ``path``.

    Raises:
        DataError: It is missing or was not written by ``write_csv``; the message names it.
    """
    beside = path.with_suffix(".json")
    try:
        return RunIdentity.model_validate_json(beside.read_bytes())
    except OSError as error:
        raise DataError(f"{beside}: {error.strerror}") from None
    except ValidationError as error:
        raise DataError(f"{beside}: not a run's identity: {first_problem(error)}") from None


def token_digests(corpus: CorpusDescription) -> dict[str, str]:
    """Return, for each split, a sha256 of its tokens, document boundaries and vectors."""
    return {
        name: hashlib.sha256("".join(_digests(counts)).encode()).hexdigest()
        for name, counts in corpus.splits.items()
    }


def _digests(counts: SplitCounts) -> Iterator[str]:
    yield from (counts.sha256.bin, counts.sha256.idx)
    for name, digests in sorted(counts.latents.items()):
        yield from (name, digests.rows, digests.offsets)


def read_description(path: Path) -> CorpusDescription:
    """Read a corpus.toml: a corpus's own or the copy in a run's folder.

    Raises:
        DataError: It cannot be read or is invalid; the message names it.
    """
    try:
        return parse_description(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: cannot be read: not UTF-8 text") from None


def at_common_steps(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray]:
    """Restrict the curves of several runs to their common steps.

    Returns:
        [n] steps, and [runs, n] losses at these steps.
    """
    common = reduce(np.intersect1d, [curve.steps for curve in curves])
    return common, np.stack([curve.losses[np.isin(curve.steps, common)] for curve in curves])


def check_comparable(runs: Sequence[RunCurves]) -> None:
    """Check that the runs' losses are comparable, because they are losses of the same tokens.

    Raises:
        DataError: Two runs differ in corpus, tokenizer, sequence length or held-out sequences; the
            message names both.
    """
    first, *others = runs
    one = first.identity
    for run in others:
        other = run.identity
        if other.vocabulary != one.vocabulary:
            raise DataError(
                f"{run.source}: tokenized as {_listed(other.vocabulary)}, but {first.source} as"
                f" {_listed(one.vocabulary)}; only runs on the same tokens can be compared"
            )
        if other.splits != one.splits:
            raise DataError(
                f"{run.source}: trained on corpus {_corpus(other)}, but {first.source} on"
                f" {_corpus(one)}; only runs on the same tokens can be compared"
            )
        for key, field in _MUST_BE_EQUAL.items():
            ours, theirs = getattr(one, field), getattr(other, field)
            if ours != theirs:
                raise DataError(
                    f"{run.source}: {key} = {_or_all(theirs)}, but {first.source} has"
                    f" {_or_all(ours)}; only losses of the same tokens can be compared"
                )


def warnings(runs: Sequence[RunCurves]) -> list[str]:
    """Return the caveats of matching these comparable runs, one line each."""
    lines = [
        f"{run.source}: stops at step {run.steps[-1]:,} of {run.identity.train_steps:,}; it may"
        " still reach losses that count as not reached"
        for run in runs
        if not run.has_ended
    ]
    pools = sorted({pool for run in runs if (pool := run.identity.pool_sequences)})
    if len(pools) > 1:
        lines.append(
            f"experts choose among the tokens of {' or '.join(map(str, pools))} sequences,"
            " depending on the run, which affects the losses"
        )
    intervals = sorted({run.report_interval for run in runs})
    if len(intervals) > 1:
        lines.append(
            f"training losses are means over {' or '.join(map(str, intervals))} steps, depending on"
            " the run, which smooths them differently"
        )
    first, *others = runs
    for key, field in _WARN_IF_DIFFERENT.items():
        ours = getattr(first.identity, field)
        lines += [
            f"{run.source}: {key} = {theirs:,}, but {first.source} has {ours:,}"
            for run in others
            if (theirs := getattr(run.identity, field)) != ours
        ]
    return lines


def group_seeds(runs: Sequence[RunCurves]) -> dict[str, list[RunCurves]]:
    """Group runs that differ only in their seed: arm's name -> its runs, in the given order.

    An arm is named after its runs, without the trailing seed: mot for mot-seed1 and mot-seed2.

    Raises:
        DataError: Two runs of an arm have the same seed; the message names both.
    """
    arms: dict[str, list[RunCurves]] = {}
    for run in runs:
        arms.setdefault(run.identity.configuration, []).append(run)
    named: dict[str, list[RunCurves]] = {}
    for members in arms.values():
        _check_seeds(members)
        first = members[0]
        shared = {_name_without_seed(run) for run in members}
        choices = (*(shared if len(shared) == 1 else ()), first.identity.name, str(first.source))
        named[next(name for name in choices if name and name not in named)] = members
    return named


def _identity(config: Config, corpus: CorpusDescription) -> RunIdentity:
    settings = config.model_dump(mode="json", exclude={"run": {"name", "seed", "directory"}})
    canonical = json.dumps(settings, sort_keys=True).encode()
    return RunIdentity(
        name=config.run.name,
        seed=config.run.seed,
        corpus=corpus.name,
        splits=token_digests(corpus),
        vocabulary=tuple(
            f"{modality.name} {modality.size} {modality.codec}" for modality in corpus.modalities
        ),
        towers=config.model.tower_names,
        parameters=count_parameters(config.model).total,
        sees_the_future=config.model.sees_the_future,
        pool_sequences=config.pool_sequences if config.model.sees_the_future else None,
        seq_length=config.data.seq_length,
        held_out_sequences=config.evaluation.max_sequences,
        step_sequences=config.training.global_batch_size,
        train_steps=config.training.train_steps,
        loss_units={
            name: unit.name
            for name, unit in config.model.loss_units.items()
            if unit != BITS_PER_TOKEN
        },
        configuration=hashlib.sha256(canonical).hexdigest(),
    )


def _read_scalars(directory: Path) -> dict[str, Points]:
    """Read all scalars of a folder of event files, by tag."""
    files = sorted(directory.glob("*tfevents*"))
    if not files:
        raise DataError(f"{directory}: no TensorBoard event files; has the run started?")
    for path in files:
        _check_records(path)
    try:
        events = EventAccumulator(str(directory), _SIZES).Reload()
    except DecodeError as error:
        raise DataError(f"{directory}: an event file holds a damaged event: {error}") from None
    # A resumed run may log a step again; later points override earlier ones.
    return {
        tag: {point.step: point.value for point in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }


def _check_records(path: Path) -> None:
    """Check that an event file is readable to its end.

    TensorBoard silently skips everything after a damaged record. A truncated last record is not
    damage: a killed process leaves one.

    Raises:
        DataError: A record does not match its checksum, is too long, or the file is no regular
            file.
    """
    try:
        size = regular_file_size(path)
        with path.open("rb") as file:
            start = 0
            while len(head := file.read(_RECORD_HEAD)) == _RECORD_HEAD:
                (length,) = struct.unpack("<Q", head[:8])
                (checksum,) = struct.unpack("<I", head[8:])
                # Check the length before reading: a forged one may be 2^62.
                if masked_crc32c(head[:8]) != checksum or length > _LONGEST_RECORD:
                    raise DataError(f"{path}: damaged after byte {start} of {size}")
                rest = file.read(length + 4)
                if len(rest) < length + 4:
                    return
                if masked_crc32c(rest[:-4]) != struct.unpack("<I", rest[-4:])[0]:
                    raise DataError(f"{path}: damaged after byte {start} of {size}")
                start += _RECORD_FRAME + length
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None


def _assemble(
    source: Path,
    identity: RunIdentity,
    losses: Mapping[tuple[Split, str], Points],
    progress: Mapping[str, Points],
) -> RunCurves:
    steps = sorted({step for points in losses.values() for step in points})
    for name, points in progress.items():
        absent = [step for step in steps if step not in points]
        if absent:
            raise DataError(
                f"{source}: no progress/{name} at step {absent[0]}; the run, or the checkpoint it"
                " resumed from, predates this tag"
            )
    return RunCurves(
        source=source,
        identity=identity,
        curves={
            key: _curve(points, averaged=key[0] == "train")
            for key, points in losses.items()
            if points
        },
        steps=np.array(steps, dtype=np.int64),
        **{name: np.array([points[step] for step in steps]) for name, points in progress.items()},
    )


def _curve(points: Points, averaged: bool) -> Curve:
    steps = sorted(points)
    losses = np.array([points[step] for step in steps])
    return Curve(np.array(steps, dtype=np.int64), losses, averaged)


def _number(cell: str) -> float:
    # Nine digits identify a float32, so this restores exactly the value in the log.
    return float(np.float32(cell)) if cell else np.nan


def _parse_tag(tag: str, path: Path) -> tuple[Split, str]:
    for split in SPLITS:
        prefix = f"{_LOSS}{split}/"
        if tag.startswith(prefix):
            return split, tag.removeprefix(prefix)
    raise DataError(f"{path}: column {tag!r}, expected {_LOSS}SPLIT/MODALITY")


def _or_all(value: int | None) -> str:
    return "all" if value is None else str(value)


def _listed(vocabulary: Sequence[str]) -> str:
    return f"({', '.join(vocabulary)})"


def _corpus(identity: RunIdentity) -> str:
    digests = ", ".join(f"{name} {digest[:8]}" for name, digest in identity.splits.items())
    return f"{identity.corpus} ({digests})"


def _check_seeds(members: Sequence[RunCurves]) -> None:
    of_seed: dict[int, RunCurves] = {}
    for run in members:
        other = of_seed.setdefault(run.identity.seed, run)
        if other is not run:
            raise DataError(
                f"{run.source}: has the same configuration and run.seed = {run.identity.seed} as"
                f" {other.source}; give each run only once"
            )


def _name_without_seed(run: RunCurves) -> str:
    name = run.identity.name.removesuffix(str(run.identity.seed))
    return re.sub(r"[-_.]*(seed|s)?[-_.]*$", "", name) if name != run.identity.name else name
