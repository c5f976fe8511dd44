"""What matches say, in words that claim no more than the numbers carry.

A slope is told from 1 by its interval, if that is clear of 1 by what matching can resolve. Without
one, from a single seed, it is unknown how much runs differ by chance, and the sentence says so. A
slope speaks of the range reached alone: an arm that leads and then stalls above the baseline's best
loss does not count as one that needs fewer steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from mot_megatron.compare.step_matching import CONFIDENCE_PERCENT, LEAST_POINTS, Match

_RESOLUTION = 0.02
"""How far slopes of noisy curves lie from the true ones; no interval over seeds tells of that."""
_WHOLE_RANGE = 0.95
"""Who reaches this much of what is matched may miss the rest by chance."""

Verdict = Literal["fewer", "fewer at first", "more", "same", "same at first", "none", "untold"]
_TALLIED: dict[Verdict, str] = {
    "fewer": "fewer steps than the baseline",
    "fewer at first": "fewer steps at first, but never the baseline's best loss",
    "more": "more steps",
    "same": "no difference that can be told",
    "same at first": "no difference at first, but never the baseline's best loss",
    "none": "none of the baseline's losses reached",
    "untold": "cannot be told",
}


def sentence(match: Match, baseline: str) -> str:
    """One match in steps, as a sentence or a few."""
    if match.slope is None:
        what = "comes to none" if match.unreached else "begins, at its first report, below all"
        return f"{match.modality}: {what} of {baseline}'s losses, the first steps' left aside."
    text = f"{match.modality}: {_ending(match, baseline)}. {_course(match, baseline)}."
    if match.baseline_overfits:
        text += f" {at_its_best(match, baseline)}."
    return text


def at_its_best(match: Match, baseline: str) -> str:
    """Of a baseline that overfits: since when, and what follows from that."""
    return (
        f"{baseline} is at its best after {match.baseline_lowest:.0%} of its steps; none behind"
        " are matched"
    )


def tally(matches: Sequence[Match]) -> str:
    """How many matches are told apart from 1, as a line; empty without any."""
    verdicts = [verdict(match) for match in matches]
    return "; ".join(
        f"{what}: {verdicts.count(name)}" for name, what in _TALLIED.items() if name in verdicts
    )


def verdict(match: Match) -> Verdict:
    """As the interval of the slope tells; untold without one, or from a few points.

    What needs more steps comes less far in as many: of it a part of the range says nothing more.
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
    """A slope or a ratio in a table."""
    return "-" if value is None else f"{value:.3f}"


def _ending(match: Match, baseline: str) -> str:
    if match.unreached:
        return (
            f"does not come to {baseline}'s best loss, but to the one that {baseline} has after"
            f" {match.range_reached * match.baseline_lowest:.0%} of its steps"
        )
    return (
        f"comes to {baseline}'s best loss after {match.end_point_ratio:.0%} of the steps that"
        f" {baseline} takes to it"
    )


def _course(match: Match, baseline: str) -> str:
    partly = match.unreached or match.baseline_overfits
    scope = "Up to there the slope is" if partly else "Over the whole course the slope is"
    slope = f"{scope} {match.slope:.2f}"
    if match.interval is None:
        if min(match.seeds, match.baseline_seeds) == 1:
            return f"{slope}, from one seed, which cannot tell it from chance"
        return f"{slope}, without an interval: with some draws of the seeds there is no slope"
    low, high = match.interval
    if match.points < LEAST_POINTS:
        return f"{slope}, from {match.points} points of the curve, which are too few to tell"
    same = "which includes 1" if low <= 1 <= high else f"which ends within {_RESOLUTION} of 1"
    said = verdict(match)
    meaning = f"{said.split()[0]} steps"
    if said.startswith("same"):
        meaning = f"{same}, no difference that can be told"
    if said.endswith("at first"):
        meaning += f" up to there, but {baseline}'s best loss is never reached"
    return f"{slope} ({CONFIDENCE_PERCENT}% interval {low:.2f} to {high:.2f}: {meaning})"
