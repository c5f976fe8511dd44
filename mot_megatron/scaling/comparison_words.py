"""What matches say, in words that claim no more than the numbers carry.

A slope is told from 1 by its interval, if that is clear of 1 by what matching can resolve. Without
one, from a single seed, it is unknown how much runs differ by chance, and the sentence says so. What
lies beyond the range reached is not spoken of.
"""

from __future__ import annotations

from collections.abc import Sequence

from mot_megatron.scaling.step_matching import CONFIDENCE_PERCENT, Match

_RESOLUTION = 0.02
"""How far slopes of noisy curves lie from the true ones; no interval over seeds tells of that."""
_OVERFITTED = 0.9
"""A baseline whose loss is lowest before this share of its steps gets worse again."""


def sentence(match: Match, baseline: str) -> str:
    """One match in steps, as a sentence or a few."""
    if match.slope is None:
        what = "comes to none" if match.unreached else "begins, at its first report, below all"
        return f"{match.modality}: {what} of {baseline}'s losses, the first steps' left aside."
    text = f"{match.modality}: {_ending(match, baseline)}. {_course(match)}."
    if match.baseline_lowest < _OVERFITTED:
        text += (
            f" {baseline} is at its best after {match.baseline_lowest:.0%} of its steps; what lies"
            " behind makes the slope smaller."
        )
    return text


def tally(matches: Sequence[Match]) -> str:
    """How many matches are told apart from 1, as a line; empty without any."""
    counts = {
        "fewer steps than the baseline": sum(verdict(match) == "fewer" for match in matches),
        "more steps": sum(verdict(match) == "more" for match in matches),
        "no difference that can be told": sum(verdict(match) == "same" for match in matches),
        "not enough seeds to tell": sum(verdict(match) == "untold" for match in matches),
    }
    parts = [f"{what}: {count}" for what, count in counts.items() if count]
    return "; ".join(parts)


def verdict(match: Match) -> str:
    """fewer, more or same, as the interval of the slope tells; untold without an interval."""
    if match.interval is None:
        return "untold"
    low, high = match.interval
    if high < 1 - _RESOLUTION:
        return "fewer"
    return "more" if low > 1 + _RESOLUTION else "same"


def _ending(match: Match, baseline: str) -> str:
    if match.unreached:
        return (
            f"does not come to {baseline}'s best loss, but to the one that {baseline} has after"
            f" {match.range_reached:.0%} of its steps"
        )
    return (
        f"comes to {baseline}'s best loss after {match.end_point_ratio:.0%} of the steps that"
        f" {baseline} was trained for"
    )


def _course(match: Match) -> str:
    scope = "Up to there the slope is" if match.unreached else "Over the whole course the slope is"
    slope = f"{scope} {match.slope:.2f}"
    if match.interval is None:
        if min(match.seeds, match.baseline_seeds) == 1:
            return f"{slope}, from one seed, which cannot tell it from chance"
        return f"{slope}, without an interval: with some draws of the seeds there is no slope"
    low, high = match.interval
    same = "which includes 1" if low <= 1 <= high else f"within {_RESOLUTION} of 1"
    meaning = {
        "fewer": "fewer steps",
        "more": "more steps",
        "same": f"{same}, no difference that can be told",
    }[verdict(match)]
    return f"{slope} ({CONFIDENCE_PERCENT}% interval {low:.2f} to {high:.2f}: {meaning})"
