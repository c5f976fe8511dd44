"""Step matching: how many of its steps a candidate needs for the baseline's losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mot_megatron.scaling.curves import AXES, Axis, RunCurves, Split, check_comparable

__all__ = ["Match", "check_comparable", "match_arms"]


@dataclass(frozen=True)
class Match:
    """One arm's curve matched against the baseline's."""

    arm: str
    modality: str
    split: Split
    axis: Axis
    slope: float | None
    """sum(t tau) / sum(t^2); None if the candidate reaches no loss of the baseline's."""
    end_point_ratio: float | None
    """tau / t at the last t that is reached."""
    interval: tuple[float, float] | None
    """95% bootstrap interval of the slope over seeds; None unless both arms have several."""
    range_reached: float
    """Last t that is reached, as a fraction of the baseline's range."""
    points: int
    """Points of the baseline that the slope comes from."""
    dropped: int
    """Points of the baseline that it does not come from, the unreached ones among them."""
    unreached: int
    """Points of the baseline whose loss the candidate never reaches."""
    seeds: int
    """Runs of the candidate."""
    baseline_seeds: int
    """Runs of the baseline."""
    t: np.ndarray
    """[points] where the baseline has a loss, in units of ``axis``."""
    tau: np.ndarray
    """[points] where the candidate first has it."""
    baseline_end: float
    """The baseline's last point on ``axis``."""

    def to_json(self) -> dict[str, Any]:
        """Everything but the arrays, for slopes.json."""
        raise NotImplementedError


def match_arms(
    baseline: Sequence[RunCurves],
    candidate: Sequence[RunCurves],
    *,
    name: str,
    axes: Sequence[Axis] = AXES,
) -> list[Match]:
    """Match a candidate's curves, a mean over its runs, against the baseline's.

    Args:
        baseline: Runs that differ in their seed only.
        candidate: Runs that differ in their seed only.
        name: Of the candidate.
        axes: What to count.

    Returns:
        A match per split, modality and axis.

    Raises:
        DataError: the runs cannot be compared, naming one.
    """
    raise NotImplementedError
