"""Step matching, the paper's central metric.

What fraction of the baseline's steps does a model need to reach the same loss? For every step t of
the baseline, tau(t) is the first step at which the candidate reaches the baseline's loss at t. The
slope sum(t tau) / sum(t^2) is the answer: 0.5 means half the steps.

Both curves are smoothed by a *centered* mean; a trailing mean would lag, by more steps the slower a
curve falls. They are then made monotone by isotonic regression. If a curve overfits, it stays at
its lowest loss from there on. If the baseline overfits, only its steps up to the minimum are
matched. The paper does not say how it fits the slope; this method is ours.
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
"""Minimum number of points of a curve; fewer do not show its shape."""
DROPPED_BEGINNING = 0.05
"""Fraction of the matched range dropped at its start, where losses say little."""
OVERFITS_BEFORE = 0.9
"""The baseline overfits if its lowest loss is before this fraction of its training; a later minimum
may be due to chance."""
RESAMPLES = 1000
_RISE_THRESHOLD = 0.5
"""A curve falls and rises again if a fit of both leaves less than this fraction of the squared
residuals that a falling fit leaves."""
CONFIDENCE_PERCENT = 95


@dataclass(frozen=True)
class Match:
    """One arm's curve matched against the baseline's."""

    arm: str
    modality: str
    split: Split
    axis: Axis
    slope: float | None
    """sum(t tau) / sum(t^2); None if the candidate reaches none of the baseline's losses, or
    reaches all of them before its own first point."""
    end_point_ratio: float | None
    """tau / t at the last t reached; None if the slope is None."""
    interval: tuple[float, float] | None
    """95% bootstrap interval of the slope over seeds; None unless both arms have several seeds."""
    paired: bool
    """Whether both arms have the same seeds. The bootstrap then draws them together: runs of one
    seed read the same batches, whose effect on both is not a difference between the arms."""
    range_reached: float
    """Last t reached, as a fraction of the last t matched."""
    points: int
    """Number of baseline points used for the slope."""
    dropped: int
    """Number of baseline points not used: at the start, not reached, or after the minimum of a
    baseline that overfits."""
    unreached: int
    """Number of matched baseline points whose loss the candidate never reaches."""
    seeds: int
    """Number of runs of the candidate."""
    baseline_seeds: int
    """Number of runs of the baseline."""
    baseline_lowest: float
    """Last t matched, as a fraction of the baseline's last t: where its loss is lowest if it rises
    again, else 1."""
    t: np.ndarray
    """[points] positions of the baseline's points, in units of ``axis``."""
    tau: np.ndarray
    """[points] where the candidate first reaches the baseline's loss at t, in the same units."""
    baseline_end: float
    """The baseline's last point on ``axis``."""

    @property
    def baseline_overfits(self) -> bool:
        """Whether the baseline's loss rises again well before its end."""
        return self.baseline_lowest < OVERFITS_BEFORE

    def to_json(self) -> dict[str, Any]:
        """Return all fields but those only drawn in plots, for slopes.json."""
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
    """Match a candidate against the baseline; curves are means over the runs of each.

    On the split ``held_out_causal``, a model whose routing never sees later tokens is matched by
    its ``held_out`` loss. If a model sees later tokens and has no ``held_out_causal`` loss, this
    split is not matched.

    Args:
        baseline: Runs that differ only in their seed.
        candidate: Runs that differ only in their seed.
        name: Name of the candidate.
        axes: Quantities to match: steps, FLOPs, seconds.

    Returns:
        A match per split, modality and axis.

    Raises:
        DataError: The runs cannot be compared, or a curve is missing, is too short, or ends at
            another step than another seed's; the message names a run.
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
    """Return the smoothing window, about 4% of the points and odd: 1 for 40 points, 49 for 1200.

    Isotonic regression removes most of the noise, and a wide window distorts the steep start: a
    window of 8% moved the slopes of noiseless power laws by up to 0.005, 4% by up to 0.0014.
    """
    return 2 * (points // 50) + 1


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Smooth by a centered mean, whose window shrinks at the start of the curve.

    At the end of the curve, a line fitted to the last window replaces the mean. If the window
    shrank there too, the last value would be a single point, and its noise would decide which loss
    is the best, because the end of a loss curve is flat.

    Args:
        values: [n].
        window: Window in points, odd, at most n.

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
    """A curve made monotone: its loss never rises."""

    x: np.ndarray
    """[n] ascending."""
    loss: np.ndarray
    """[n] non-increasing."""
    matched: int
    """Number of points up to the minimum if the original curve rises after it; else n."""


def falling(x: np.ndarray, values: np.ndarray) -> Falling:
    """Make a curve monotone by isotonic regression.

    If the curve falls and then rises again, the regression covers only the fall, and the curve
    stays at its lowest value from there on. Regression over the whole curve would average fall and
    rise around the minimum; for example, with the minimum at 60% of the steps, only 16% of the
    range would count as reached.

    A curve counts as rising again if a falling fit up to its lowest value and a rising fit from
    there leave less than half the squared residuals of a single falling fit. This threshold is
    needed because a noisy falling curve also rises a little after its lowest value.

    Args:
        x: [n] ascending.
        values: [n] loss at x.
    """
    lowest = int(np.argmin(values))
    whole = isotonic_regression(values, increasing=False)
    fall = isotonic_regression(values[: lowest + 1], increasing=False)
    rise = isotonic_regression(values[lowest:], increasing=True)
    left = np.square(values[: lowest + 1] - fall).sum() + np.square(values[lowest:] - rise).sum()
    if left >= _RISE_THRESHOLD * np.square(values - whole).sum():
        return Falling(x, whole, len(x))
    kept = np.full(len(values) - lowest - 1, values[lowest])
    return Falling(x, np.concatenate([fall, kept]), lowest + 1)


def steps_to_match(loss: np.ndarray, x: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """Return where a falling curve first reaches each loss, by linear interpolation.

    Args:
        loss: [m] losses to reach.
        x: [n] ascending.
        candidate: [n] loss at x, non-increasing.

    Returns:
        [m] positions on x; inf if a loss is never reached, NaN if it is reached before the first x.
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
    """tau(t) of two curves, and the statistics derived from it."""

    t: np.ndarray
    """[points] t of the points kept."""
    tau: np.ndarray
    """[points] tau at t."""
    end: float
    """Last t of the baseline, kept or not."""
    range_reached: float
    """Last t reached, kept or not, over the last t matched."""
    dropped: int
    """Number of baseline points not kept."""
    unreached: int
    """Number of matched points whose loss the candidate never reaches."""
    lowest: float
    """Last t matched over ``end``: at the baseline's minimum if its loss rises again, else 1."""

    @property
    def slope(self) -> float | None:
        """Slope of the least-squares line through the origin; None without points."""
        if len(self.t) == 0:
            return None
        return float((self.t * self.tau).sum() / (self.t**2).sum())

    @property
    def end_point_ratio(self) -> float | None:
        """Ratio tau / t at the last point kept; None without points."""
        return float(self.tau[-1] / self.t[-1]) if len(self.t) else None


def match_curves(baseline: Falling, candidate: Falling) -> Fit:
    """Match two curves; if the baseline overfits, only its points up to the minimum."""
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
    """Return the splits that have a match, in the order of SPLITS."""
    return [split for split in SPLITS if any(match.split == split for match in matches)]


def smoothed_mean(curves: Sequence[Curve]) -> Curve:
    """Return the smoothed mean of several runs at their common steps, not made monotone."""
    steps, losses = at_common_steps(curves)
    return Curve(steps, smooth(losses.mean(axis=0), default_window(len(steps))))


@dataclass(frozen=True, eq=False)
class _Arm:
    """The curves of an arm's runs for one split and modality, at their common steps."""

    seeds: tuple[int, ...]
    """Seeds of the runs, ascending."""
    losses: np.ndarray
    """[runs, n] losses."""
    along: dict[Axis, np.ndarray]
    """Axis -> [runs, n] positions of the points."""

    @classmethod
    def of(cls, runs: Sequence[RunCurves], split: Split, modality: str) -> _Arm:
        runs = sorted(runs, key=lambda run: run.identity.seed)
        curves = [_curve_of(run, split, modality) for run in runs]
        for run, curve in zip(runs, curves, strict=True):
            if curve.steps[-1] != curves[0].steps[-1]:
                raise DataError(
                    f"{run.source}: loss_{split}/{modality} ends at step {curve.steps[-1]}, but"
                    f" in {runs[0].source} at step {curves[0].steps[-1]}; runs of one arm must be"
                    " equally long (have all of them finished?)"
                )
        common, losses = at_common_steps(curves)
        if len(common) < LEAST_POINTS:
            raise DataError(
                f"{runs[0].source}: loss_{split}/{modality} has {len(common)} points, expected at"
                f" least {LEAST_POINTS}; evaluation.interval_steps and logging.interval_steps"
                " determine the number of points"
            )
        points = [Curve(common, row, curves[0].averaged) for row in losses]
        along: dict[Axis, np.ndarray] = {
            axis: np.stack([run.along(own, axis) for run, own in zip(runs, points, strict=True)])
            for axis in AXES
        }
        return cls(tuple(run.identity.seed for run in runs), losses, along)

    def mean(self, axis: Axis, drawn: Sequence[int] | None = None) -> Falling:
        """Return the mean over all runs or the ``drawn`` indices, smoothed and made monotone."""
        runs = list(range(len(self.seeds)) if drawn is None else drawn)
        losses = self.losses[runs].mean(axis=0)
        smoothed = smooth(losses, default_window(len(losses)))
        return falling(self.along[axis][runs].mean(axis=0), smoothed)


def _bootstrap(
    baseline: _Arm, candidate: _Arm, axis: Axis, paired: bool
) -> tuple[float, float] | None:
    """Return the bootstrap interval of the slope: runs are drawn with replacement.

    If ``paired``, both arms use the same draws; otherwise each arm is drawn independently. Returns
    None if an arm has a single run, which does not show how much runs differ, or if some draw has
    no slope.
    """
    if min(len(baseline.seeds), len(candidate.seeds)) == 1:
        return None
    # A few runs have few distinct draws, so caching computes each of them once.

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
    """Return the (split, modality) pairs to match: in the order of SPLITS, then of the curves."""
    found = dict.fromkeys(key for run in runs for key in run.curves)
    honest = not any(run.without_honest_loss for run in runs)
    splits = [split for split in SPLITS if honest or split != "held_out_causal"]
    return [key for split in splits for key in found if key[0] == split]


def _curve_of(run: RunCurves, split: Split, modality: str) -> Curve:
    curve = run.curve(split, modality)
    if curve is None:
        raise DataError(f"{run.source}: no points of loss_{split}/{modality}; other runs have them")
    return curve


def _rounded(value: float | tuple[float, ...]) -> float | list[float]:
    return [round(part, 5) for part in value] if isinstance(value, tuple) else round(value, 5)
