"""Describe matches in sentences that claim no more than the numbers support.

A slope differs from 1 only if its interval excludes 1 by more than the resolution of step matching.
With a single seed there is no interval: how much runs differ by chance is unknown, and the sentence
says so. A slope describes only the range reached: an arm that leads and then stalls above the
baseline's best loss does not count as needing fewer steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from mot_megatron.compare.step_matching import CONFIDENCE_PERCENT, LEAST_POINTS, Match

_RESOLUTION = 0.02
"""Error of the slopes of noisy curves, which intervals over seeds do not include."""
_WHOLE_RANGE = 0.95
"""Range reached from which the rest may be missed by chance."""

Verdict = Literal["fewer", "fewer at first", "more", "same", "same at first", "none", "untold"]
_TALLIED: dict[Verdict, str] = {
    "fewer": "fewer steps than the baseline",
    "fewer at first": "fewer steps at first, but the baseline's best loss is never reached",
    "more": "more steps than the baseline",
    "same": "no significant difference",
    "same at first": (
        "no significant difference at first, but the baseline's best loss is never reached"
    ),
    "none": "none of the baseline's losses reached",
    "untold": "inconclusive (no interval or too few points)",
}


def sentence(match: Match, baseline: str) -> str:
    """Describe one match in steps, in one or a few sentences."""
    if match.slope is None:
        losses = f"the losses that {baseline} has after its first steps"
        what = "it reaches none of" if match.unreached else "its first logged loss is below all of"
        return f"{match.modality}: no slope, because {what} {losses}."
    text = f"{match.modality}: {_ending(match, baseline)}. {_course(match, baseline)}."
    if match.baseline_overfits:
        text += f" {at_its_best(match, baseline)}."
    return text


def at_its_best(match: Match, baseline: str) -> str:
    """Describe where a baseline that overfits has its lowest loss, and the consequence."""
    return (
        f"{baseline}'s loss is lowest after {match.baseline_lowest:.0%} of its steps and then"
        " rises; later steps are not matched"
    )


def tally(matches: Sequence[Match]) -> str:
    """Return the number of matches per verdict, as a line; empty without matches."""
    verdicts = [verdict(match) for match in matches]
    return "; ".join(
        f"{what}: {verdicts.count(name)}" for name, what in _TALLIED.items() if name in verdicts
    )


def verdict(match: Match) -> Verdict:
    """Judge a match by the interval of its slope; untold without one or with few points.

    "more" has no "at first" variant: an arm that needs more steps always reaches less of the range
    in the same number of steps.
    """
    if match.slope is None and match.unreached:
        return "none"
    if match.interval is None or match.points < LEAST_POINTS:
        return "untold"
    low, high = match.interval
    if low > 1 + _RESOLUTION:
        return "more"
    fewer = high < 1 - _RESOLUTION
    if match.range_reached < _WHOLE_RANGE:
        return "fewer at first" if fewer else "same at first"
    return "fewer" if fewer else "same"


def number(value: float | None) -> str:
    """Format a slope or a ratio for a table."""
    return "-" if value is None else f"{value:.3f}"


def _ending(match: Match, baseline: str) -> str:
    """Describe which of the baseline's losses the arm reaches in the end, and when."""
    if match.unreached:
        return (
            f"never reaches {baseline}'s best loss, only the loss that {baseline} has after"
            f" {match.range_reached * match.baseline_lowest:.0%} of its steps"
        )
    return (
        f"reaches {baseline}'s best loss in {match.end_point_ratio:.0%} of the steps that"
        f" {baseline} needs"
    )


def _course(match: Match, baseline: str) -> str:
    """Describe the slope, and what its interval allows to conclude."""
    partly = match.unreached or match.baseline_overfits
    scope = "Up to there, the slope is" if partly else "Over the whole range, the slope is"
    slope = f"{scope} {match.slope:.2f}"
    if match.interval is None:
        if min(match.seeds, match.baseline_seeds) == 1:
            return f"{slope} (one seed: the difference from 1 may be due to chance)"
        return f"{slope} (no interval: some bootstrap draws of the seeds have no slope)"
    low, high = match.interval
    if match.points < LEAST_POINTS:
        return f"{slope} (from only {match.points} points of the curve, too few for a conclusion)"
    said = verdict(match)
    meaning = f"{said.split()[0]} steps than {baseline}"
    if said.startswith("same"):
        near = "includes 1" if low <= 1 <= high else f"comes within {_RESOLUTION} of 1"
        meaning = f"no significant difference, because the interval {near}"
    return f"{slope} ({CONFIDENCE_PERCENT}% interval {low:.2f} to {high:.2f}): {meaning}"
