"""Write the results of step matching: slopes.json, and plots as PNG and in tensorboard/."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from mot_megatron.compare.curves import Axis, RunCurves
from mot_megatron.compare.plots import plot_losses, plot_matches, write_figures
from mot_megatron.compare.step_matching import Match, splits_of
from mot_megatron.errors import DataError

SLOPES_FILE = "slopes.json"


def draw_all(
    arms: Mapping[str, Sequence[RunCurves]], matches: Sequence[Match], axis: Axis = "steps"
) -> dict[str, Figure]:
    """Draw the matches and losses of every split; return the plots by name.

    Args:
        arms: Name -> its runs; the baseline first.
        matches: Matches of the other arms against the baseline, from ``match_arms``.
        axis: Axis of the plots of matches.
    """
    baseline = next(iter(arms))
    splits = splits_of(matches)
    figures = {
        f"matched_{axis}_{split}": plot_matches(matches, split=split, axis=axis, baseline=baseline)
        for split in splits
    }
    return figures | {f"losses_{split}": plot_losses(arms, split=split) for split in splits}


def write_matches(
    matches: Sequence[Match], figures: Mapping[str, Figure], directory: Path
) -> list[Path]:
    """Write slopes.json and the plots to a folder, which is created if needed.

    Returns:
        The paths of slopes.json and the PNG files.

    Raises:
        DataError: A file cannot be written.
    """
    slopes = json.dumps([match.to_json() for match in matches], indent=1)
    path = directory / SLOPES_FILE
    try:
        directory.mkdir(parents=True, exist_ok=True)
        path.write_text(slopes + "\n", encoding="utf-8")
        return [path, *write_figures(figures, directory)]
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}") from None
