"""The paper's plot, the baseline's steps against steps to match, and the curves themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from mot_megatron.scaling.curves import Axis, RunCurves, Split
from mot_megatron.scaling.step_matching import Match


def plot_matches(
    matches: Sequence[Match], *, split: Split, axis: Axis = "steps", baseline: str = "dense"
) -> Figure:
    """A panel per modality, a line per arm; of ``matches``, those of ``split`` and ``axis``."""
    raise NotImplementedError


def plot_losses(arms: Mapping[str, Sequence[RunCurves]], *, split: Split) -> Figure:
    """A panel per modality: every arm's mean over its runs, and each run as a thin line."""
    raise NotImplementedError


def write_figures(figures: Mapping[str, Figure], directory: Path) -> list[Path]:
    """Write every figure as NAME.png into ``directory`` and as an image into its tensorboard/."""
    raise NotImplementedError
