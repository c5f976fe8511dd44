"""Step matching, the paper's central metric: what part of its steps a candidate needs.

For every step t of a baseline, tau(t) is the first step at which a candidate has reached the
baseline's loss at t; the slope s = sum(t tau) / sum(t^2) is 0.5 for half the steps. Both curves are
smoothed by a *centered* mean (a trailing one would lag, by more steps the slower a curve falls) and
made monotone by isotonic regression up to their lowest point, behind which a model that overfits
keeps its best loss. Only the baseline's steps up to its lowest point are matched: what it does
after its best is no measure of others. The paper names no way of fitting; this is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from scipy.signal import savgol_filter
from sklearn.isotonic import isotonic_regression

from mot_megatron.compare.curves import (
    AXES,
    SPLITS,
    Axis,
    Curve,
    RunCurves,
    Split,
    at_common_steps,
    check_comparable,
)
from mot_megatron.errors import DataError

LEAST_POINTS = 5
"""Of a curve; fewer say nothing about its course."""
DROPPED_BEGINNING = 0.05
"""Share of what is matched of the baseline whose points do not count: losses of the first steps say
little."""
OVERFITS_BEFORE = 0.9
"""Share of the baseline's training: what is lowest later may be so by chance."""
RESAMPLES = 1000
_TURNS = 0.5
"""A curve turns if fall and rise leave at most this part of the squares that a fall leaves."""
CONFIDENCE_PERCENT = 95


@dataclass(frozen=True)
class Match:
    """One arm's curve matched against the baseline's."""

    arm: str
    modality: str
    split: Split
    axis: Axis
    slope: float | None
    """sum(t tau) / sum(t^2); None if the candidate reaches none of the baseline's losses, or all
    before its own first point."""
    end_point_ratio: float | None
    """tau / t at the last t that is reached; None as the slope is."""
    interval: tuple[float, float] | None
    """95% bootstrap interval of the slope over seeds; None unless both arms have several."""
    paired: bool
    """Whether both arms have the same seeds, which are then drawn together: runs of one seed read
    the same batches, and what those do to both is no difference between them."""
    range_reached: float
    """Last t that is reached, as a fraction of the t at which the baseline's loss is lowest."""
    points: int
    """Points of the baseline that the slope comes from."""
    dropped: int
    """Points of the baseline that it does not come from: its first ones, the unreached ones and
    those after its lowest."""
    unreached: int
    """Points of the baseline, up to its lowest, whose loss the candidate never reaches."""
    seeds: int
    """Runs of the candidate."""
    baseline_seeds: int
    """Runs of the baseline."""
    baseline_lowest: float
    """Where the baseline's loss turns to rise again, as a fraction of its range, or 1; up to there
    is matched."""
    t: np.ndarray
    """[points] where the baseline has a loss, in units of ``axis``."""
    tau: np.ndarray
    """[points] where the candidate first has it."""
    baseline_end: float
    """The baseline's last point on ``axis``."""

    @property
    def baseline_overfits(self) -> bool:
        """Whether the baseline's loss rises again well before its end."""
        return self.baseline_lowest < OVERFITS_BEFORE

    def to_json(self) -> dict[str, Any]:
        """Everything but what is drawn, for slopes.json."""
        drawn = ("t", "tau", "baseline_end")
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: _rounded(value) if isinstance(value, float | tuple) else value
            for name, value in values.items()
            if name not in drawn
        }


def match_arms(
    baseline: Sequence[RunCurves],
    candidate: Sequence[RunCurves],
    *,
    name: str,
    axes: Sequence[Axis] = AXES,
) -> list[Match]:
    """Match a candidate's curves, a mean over its runs, against the baseline's.

    Against a ``held_out_causal`` stands the ``held_out`` of a model that does not see the future.
    Where one does and has no ``held_out_causal``, there is no match on that split.

    Args:
        baseline: Runs that differ in their seed only.
        candidate: Runs that differ in their seed only.
        name: Of the candidate.
        axes: What to count.

    Returns:
        A match per split, modality and axis.

    Raises:
        DataError: the runs cannot be compared, or a curve is missing, too short, or ends where
            another seed's does not; the line names a run.
    """
    check_comparable([*baseline, *candidate])
    matches = []
    for split, modality in _splits_and_modalities([*baseline, *candidate]):
        ours = _Arm.of(baseline, split, modality)
        theirs = _Arm.of(candidate, split, modality)
        paired = ours.seeds == theirs.seeds
        for axis in axes:
            fit = match_curves(ours.mean(axis), theirs.mean(axis))
            match = Match(
                name, modality, split, axis,
                slope=fit.slope,
                end_point_ratio=fit.end_point_ratio,
                interval=_bootstrap(ours, theirs, axis, paired),
                paired=paired,
                range_reached=fit.range_reached,
                points=len(fit.t),
                dropped=fit.dropped,
                unreached=fit.unreached,
                seeds=len(theirs.seeds),
                baseline_seeds=len(ours.seeds),
                baseline_lowest=fit.lowest,
                t=fit.t,
                tau=fit.tau,
                baseline_end=fit.end,
            )  # fmt: skip
            matches.append(match)
    return matches


def default_window(points: int) -> int:
    """About 4% of the points, and odd: 1 of 40, 49 of 1200.

    Isotonic regression takes most of the noise away, and a wide window bends the steep beginning:
    8% moved the slopes of noiseless power laws by up to 0.005, 4% by up to 0.0014.
    """
    return 2 * (points // 50) + 1


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centered mean; at the beginning its window shrinks, at the end it is a line through the last.

    A curve is steep at its beginning and flat at its end. There a shrinking window would come down
    to a single value, and that one's noise would decide which loss is the best.

    Args:
        values: [n].
        window: In points, odd, at most n.

    Returns:
        [n].
    """
    if window == 1:
        return values.copy()
    smoothed = np.asarray(savgol_filter(values, window, polyorder=1))
    for index in range(window // 2):
        smoothed[index] = values[: 2 * index + 1].mean()
    return smoothed


class Falling(NamedTuple):
    """A curve that never rises."""

    x: np.ndarray
    """[n] rising."""
    loss: np.ndarray
    """[n]."""
    matched: int
    """Points up to its lowest, if it rises again behind that; else n."""


def falling(x: np.ndarray, values: np.ndarray) -> Falling:
    """Isotonic regression; of a curve that turns, up to its lowest value, and that from there on.

    Over all of a curve that rises again the regression would put the mean of fall and rise where
    the lowest values are: of a curve with its best at 60%, only 16% would then count as reached. A
    curve turns if a fall and a rise from the lowest value leave less than half the squares that a
    fall alone leaves: behind the lowest value of a noisy fall there is a little rise too.

    Args:
        x: [n] rising.
        values: [n] at x.
    """
    lowest = int(np.argmin(values))
    whole = isotonic_regression(values, increasing=False)
    fall = isotonic_regression(values[: lowest + 1], increasing=False)
    rise = isotonic_regression(values[lowest:], increasing=True)
    left = np.square(values[: lowest + 1] - fall).sum() + np.square(values[lowest:] - rise).sum()
    if left >= _TURNS * np.square(values - whole).sum():
        return Falling(x, whole, len(x))
    kept = np.full(len(values) - lowest - 1, values[lowest])
    return Falling(x, np.concatenate([fall, kept]), lowest + 1)


def steps_to_match(loss: np.ndarray, x: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """Where a falling curve first reaches losses, interpolated between its points.

    Args:
        loss: [m] losses to reach.
        x: [n] rising.
        candidate: [n] loss at x, never rising.

    Returns:
        [m]; inf where it is never reached, NaN where it is reached somewhere before the first x.
    """
    after = np.searchsorted(-candidate, -loss)  # first index with candidate <= loss
    tau = np.where(after == len(x), np.inf, np.nan)
    tau[loss == candidate[0]] = x[0]
    inside = (after > 0) & (after < len(x))
    upper, lower = candidate[after[inside] - 1], candidate[after[inside]]
    share = (upper - loss[inside]) / (upper - lower)
    tau[inside] = x[after[inside] - 1] + share * (x[after[inside]] - x[after[inside] - 1])
    return tau


@dataclass(frozen=True)
class Fit:
    """tau(t) of two curves, and what it says."""

    t: np.ndarray
    """[points] kept."""
    tau: np.ndarray
    """[points]."""
    end: float
    """Last t of the baseline, kept or not."""
    range_reached: float
    """Last t reached, kept or not, over that of the baseline's lowest loss."""
    dropped: int
    """Points not kept."""
    unreached: int
    """Of them those up to the lowest that the candidate never reaches."""
    lowest: float
    """t of the baseline's lowest loss over ``end``; 1 where it does not rise again."""

    @property
    def slope(self) -> float | None:
        """Of the line through the origin that fits tau best; None without points."""
        if len(self.t) == 0:
            return None
        return float((self.t * self.tau).sum() / (self.t**2).sum())

    @property
    def end_point_ratio(self) -> float | None:
        """The last point's tau / t; None without points."""
        return float(self.tau[-1] / self.t[-1]) if len(self.t) else None


def match_curves(baseline: Falling, candidate: Falling) -> Fit:
    """Match two curves; of the baseline up to its lowest loss, behind which it may rise again."""
    t, loss = baseline.x[: baseline.matched], baseline.loss[: baseline.matched]
    tau = steps_to_match(loss, candidate.x, candidate.loss)
    reached = t[tau != np.inf]
    kept = np.isfinite(tau) & (t >= DROPPED_BEGINNING * t[-1])
    end = float(baseline.x[-1])
    return Fit(
        t=t[kept],
        tau=tau[kept],
        end=end,
        range_reached=float(reached[-1] / t[-1]) if len(reached) else 0.0,
        dropped=len(baseline.x) - int(kept.sum()),
        unreached=int((tau == np.inf).sum()),
        lowest=float(t[-1] / end),
    )


def splits_of(matches: Sequence[Match]) -> list[Split]:
    """Those that any match is of, in their order."""
    return [split for split in SPLITS if any(match.split == split for match in matches)]


def smoothed_mean(curves: Sequence[Curve]) -> Curve:
    """The mean of several runs at the steps that all of them have, as it is before it is matched.

    Smooth, but not made monotone.
    """
    steps, bits = at_common_steps(curves)
    return Curve(steps, smooth(bits.mean(axis=0), default_window(len(steps))))


@dataclass(frozen=True, eq=False)
class _Arm:
    """The curves of an arm's runs for one split and modality, at the steps that all have."""

    seeds: tuple[int, ...]
    """Of the runs, rising."""
    bits: np.ndarray
    """[runs, n]."""
    along: dict[Axis, np.ndarray]
    """Per axis [runs, n]: where the points lie."""

    @classmethod
    def of(cls, runs: Sequence[RunCurves], split: Split, modality: str) -> _Arm:
        runs = sorted(runs, key=lambda run: run.identity.seed)
        curves = [_curve_of(run, split, modality) for run in runs]
        for run, curve in zip(runs, curves, strict=True):
            if curve.steps[-1] != curves[0].steps[-1]:
                raise DataError(
                    f"{run.source}: loss_{split}/{modality} ends at step {curve.steps[-1]}, but"
                    f" that of {runs[0].source} at {curves[0].steps[-1]}; runs of one arm must be"
                    " equally long (has each come to its end?)"
                )
        common, bits = at_common_steps(curves)
        if len(common) < LEAST_POINTS:
            raise DataError(
                f"{runs[0].source}: loss_{split}/{modality} has {len(common)} points, expected at"
                f" least {LEAST_POINTS}; evaluation.interval_steps and logging.interval_steps set"
                " their number"
            )
        points = [Curve(common, row) for row in bits]
        along: dict[Axis, np.ndarray] = {
            axis: np.stack([run.along(own, axis) for run, own in zip(runs, points, strict=True)])
            for axis in AXES
        }
        return cls(tuple(run.identity.seed for run in runs), bits, along)

    def mean(self, axis: Axis, drawn: Sequence[int] | None = None) -> Falling:
        """Smooth and falling, the mean over all or the drawn runs."""
        runs = list(range(len(self.seeds)) if drawn is None else drawn)
        bits = self.bits[runs].mean(axis=0)
        smoothed = smooth(bits, default_window(len(bits)))
        return falling(self.along[axis][runs].mean(axis=0), smoothed)


def _bootstrap(
    baseline: _Arm, candidate: _Arm, axis: Axis, paired: bool
) -> tuple[float, float] | None:
    """Interval of the slope when the runs are drawn anew, with replacement.

    Together if ``paired``; else those of each arm by themselves. None where
    an arm has a single run, which says nothing about how much runs differ, and where some draw
    reaches no loss of the baseline's, so that it has no slope.
    """
    if min(len(baseline.seeds), len(candidate.seeds)) == 1:
        return None
    # A few runs have few different draws: each is smoothed, and each pair matched, once.

    @cache
    def curve(arm: _Arm, runs: tuple[int, ...]) -> Falling:
        return arm.mean(axis, runs)

    @cache
    def slope(ours: tuple[int, ...], theirs: tuple[int, ...]) -> float | None:
        return match_curves(curve(baseline, ours), curve(candidate, theirs)).slope

    rng = np.random.default_rng(0)

    def draw(arm: _Arm) -> tuple[int, ...]:
        return tuple(sorted(rng.integers(len(arm.seeds), size=len(arm.seeds)).tolist()))

    def draw_both() -> tuple[tuple[int, ...], tuple[int, ...]]:
        ours = draw(baseline)
        return ours, ours if paired else draw(candidate)

    slopes = [slope(*draw_both()) for _ in range(RESAMPLES)]
    known = [value for value in slopes if value is not None]
    if len(known) < len(slopes):
        return None
    outside = (100 - CONFIDENCE_PERCENT) / 2
    low, high = np.percentile(known, [outside, 100 - outside])
    return float(low), float(high)


def _splits_and_modalities(runs: Sequence[RunCurves]) -> list[tuple[Split, str]]:
    """Those that any run has, splits in their order, modalities in that of the curves."""
    found = dict.fromkeys(key for run in runs for key in run.curves)
    honest = not any(run.without_honest_loss for run in runs)
    splits = [split for split in SPLITS if honest or split != "held_out_causal"]
    return [key for split in splits for key in found if key[0] == split]


def _curve_of(run: RunCurves, split: Split, modality: str) -> Curve:
    curve = run.curve(split, modality)
    if curve is None:
        raise DataError(f"{run.source}: no points of loss_{split}/{modality}, which others have")
    return curve


def _rounded(value: float | tuple[float, ...]) -> float | list[float]:
    return [round(part, 5) for part in value] if isinstance(value, tuple) else round(value, 5)
