"""The loss curves of a run: read from its TensorBoard log, kept as a small CSV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

Split = Literal["train", "held_out", "held_out_causal"]
Axis = Literal["steps", "flops", "seconds"]
SPLITS: tuple[Split, ...] = ("train", "held_out", "held_out_causal")
AXES: tuple[Axis, ...] = ("steps", "flops", "seconds")


@dataclass(frozen=True)
class RunIdentity:
    """What a run is, so that only comparable ones are compared and seeds are found."""

    name: str
    """``run.name``."""
    seed: int
    """``run.seed``."""
    corpus: str
    """Name of the corpus."""
    splits: dict[str, str]
    """Per split of the corpus the sha256 of its tokens."""
    vocabulary: tuple[str, ...]
    """Per modality its name, number of ids and codec, in the order of the ids."""
    towers: tuple[str, ...]
    """Names of the towers; one: dense."""
    parameters: int
    """Of the whole model."""
    configuration: str
    """sha256 of the configuration without run.name, run.seed and run.directory: names the arm."""


@dataclass(frozen=True)
class Curve:
    """Loss of one modality on one split."""

    steps: np.ndarray
    """[n] int64, rising: steps done."""
    bits: np.ndarray
    """[n] float64, bits per token."""


@dataclass(frozen=True)
class RunCurves:
    """All loss curves of one run."""

    source: Path
    """The run's folder or the CSV, for error messages."""
    identity: RunIdentity
    curves: Mapping[tuple[Split, str], Curve]
    """By split and modality; absent where nothing was logged."""
    steps: np.ndarray
    """[m] int64, rising: all logged steps."""
    tokens: np.ndarray
    """[m] document tokens trained on so far, over all ranks."""
    flops: np.ndarray
    """[m] model FLOPs so far, over all ranks."""
    seconds: np.ndarray
    """[m] seconds spent in training steps so far."""

    def along(self, curve: Curve, axis: Axis) -> np.ndarray:
        """Where the points of ``curve`` lie on ``axis``, [n] float64."""
        raise NotImplementedError


def read_run(directory: Path) -> RunCurves:
    """The curves of the run in ``directory``.

    Raises:
        DataError: logs are missing or damaged, naming the folder.
    """
    raise NotImplementedError


def write_csv(curves: RunCurves, path: Path) -> None:
    """Write ``path`` and, beside it, the identity as ``path.with_suffix(".json")``."""
    raise NotImplementedError


def read_csv(path: Path) -> RunCurves:
    """What ``write_csv`` wrote.

    Raises:
        DataError: a file is missing or was not written by ``write_csv``.
    """
    raise NotImplementedError


def check_comparable(runs: Sequence[RunCurves]) -> None:
    """Check that all runs were trained on the same tokens.

    Raises:
        DataError: another corpus or tokenizer, naming both runs.
    """
    raise NotImplementedError


def group_seeds(runs: Sequence[RunCurves]) -> dict[str, list[RunCurves]]:
    """Runs that differ in their seed only belong together: arm's name -> runs, in their order."""
    raise NotImplementedError
