"""Conclusions from scaling reports: time to the dense model's loss, and what became slower."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mot_megatron.errors import DataError
from mot_megatron.files import read_regular_file
from mot_megatron.planning.arms import MODEL
from mot_megatron.scaling.report import Row, Spread


@dataclass(frozen=True)
class TimeToLoss:
    """Time that a model needs for the dense model's loss, over the time of the dense model."""

    modality: str
    split: str
    stamp: str
    """Where the slope comes from: MEASURED, or PAPER for published ones."""
    world_size: int
    slope: float
    """Fraction of the dense model's steps."""
    ratio: float
    """The product of the slope and the step ratio."""
    low: float | None
    """The product of the lower ends of both; None without an interval of the slope."""
    high: float | None


def times_to_loss(ratios: Mapping[int, Spread], path: Path, arm: str) -> list[TimeToLoss]:
    """Multiply step ratios with the slopes of step matching.

    Args:
        ratios: Step time over that of the dense twin, by number of ranks.
        path: ``slopes.json`` of a comparison.
        arm: The comparison's arm with the measured architecture.

    Raises:
        DataError: The file has no slopes of the arm, or there is no step ratio.
    """
    try:
        matches: list[dict[str, Any]] = json.loads(read_regular_file(path))
        arms = list(dict.fromkeys(match["arm"] for match in matches))
        mine = [
            match
            for match in matches
            if match["arm"] == arm and match["axis"] == "steps" and match["slope"] is not None
        ]
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not the slopes.json of a comparison: {error}") from None
    if not mine:
        raise DataError(f"{path}: no slope of arm {arm!r}; arms: {', '.join(arms)}")
    if not ratios:
        raise DataError("no step ratio is known; run the command with --arms dense")
    found = []
    for match in mine:
        interval = match["interval"]
        for size, ratio in ratios.items():
            found.append(
                TimeToLoss(
                    modality=match["modality"],
                    split=match["split"],
                    stamp=match.get("stamp", "MEASURED"),
                    world_size=size,
                    slope=match["slope"],
                    ratio=match["slope"] * ratio.median,
                    low=interval[0] * ratio.low if interval else None,
                    high=interval[1] * ratio.high if interval else None,
                )
            )
    return found


def ratios_of(rows: Sequence[Row]) -> dict[int, Spread]:
    """Return the measured step ratios of the model by number of ranks."""
    return {row.world_size: row.ratio for row in rows if row.arm == MODEL and row.ratio}


def times_page(times: Sequence[TimeToLoss], path: Path, arm: str, stamp: str) -> list[str]:
    """Return the lines of a section of a report whose step ratios have a stamp."""
    slopes = times[0].stamp
    lines = [
        "",
        "## Time to the dense model's loss",
        "",
        f"Step ratio ({stamp}) times the fraction of the dense model's steps ({slopes}, arm"
        f" {arm} of `{path}`), with the product of the ends of both intervals: below 1, the model"
        " reaches the dense model's loss sooner. The two belong together only if both were measured"
        " for the same architecture.",
        "",
        "| modality | losses | ranks | fraction of steps | fraction of time |",
        "|---|---|---|---|---|",
    ]
    for each in times:
        spread = "" if each.low is None else f" ({each.low:.3f} to {each.high:.3f})"
        lines.append(
            f"| {each.modality} | {each.split.replace('_', ' ')} | {each.world_size} |"
            f" {each.slope:.3f} | {each.ratio:.3f}{spread} |"
        )
    return lines


def regressions(before: Sequence[Row], after: Sequence[Row]) -> list[str]:
    """Return a sentence for each figure that is worse than before, beyond the spread of both.

    Raises:
        DataError: The reports have no arm and number of ranks in common.
    """
    known = {(row.arm, row.world_size): row for row in before}
    pairs = [
        (known[row.arm, row.world_size], row) for row in after if (row.arm, row.world_size) in known
    ]
    if not pairs:
        raise DataError("the two measurements have no arm and number of ranks in common")
    found = []
    for old, new in pairs:
        ranks = "1 rank" if new.world_size == 1 else f"{new.world_size} ranks"
        place = f"{new.arm}, {ranks}"
        slower = new.step_seconds.low > old.step_seconds.high
        if slower and new.tokens_per_gpu_second.high < old.tokens_per_gpu_second.low:
            change = new.tokens_per_gpu_second.median / old.tokens_per_gpu_second.median - 1
            found.append(
                f"{place}: {old.tokens_per_gpu_second.text()} tokens/s per rank before,"
                f" {new.tokens_per_gpu_second.text()} now ({change:+.1%})"
            )
        if old.ratio and new.ratio and new.ratio.low > old.ratio.high:
            found.append(
                f"{place}: a step took {old.ratio.text(3)} of the dense twin's before,"
                f" {new.ratio.text(3)} now"
            )
    return found
