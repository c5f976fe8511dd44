"""Plot step matching, as in the paper, and loss curves.

Figures are not registered with pyplot, so they are freed after use and need no display. Legends are
below the panels, where they cover no lines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, StrMethodFormatter
from torch.utils.tensorboard import SummaryWriter

from mot_megatron.compare.curves import SPLIT_TITLES, Axis, Curve, RunCurves, Split
from mot_megatron.compare.step_matching import Match, smoothed_mean

# The palette of Okabe and Ito, distinguishable with any color vision; the baseline is gray.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_LINE_STYLES = ("-", (0, (6, 1, 1, 1)), (0, (1, 1)))
_BASELINE_COLOR = "#4D4D4D"
_AXIS_TITLES: dict[Axis, str] = {
    "steps": "steps",
    "flops": "FLOPs",
    "seconds": "seconds of training",
}
_DPI = 150
_PANEL_INCHES = (4.4, 3.9)
_LEGEND_LINE_INCHES = 0.23
_PANELS_PER_ROW = 3
_TEXT, _SMALL, _TITLE = 10.5, 9.5, 13.5
_LEGEND: dict[str, Any] = {
    "fontsize": _SMALL,
    "title_fontsize": _SMALL,
    "frameon": False,
    "handlelength": 2.4,
    "alignment": "left",
}
_AREA_ALPHA = 0.16
_BEGINNING = 0.03
"""Fraction of the steps, the first ones, whose losses may exceed the y axis; otherwise they would
take up most of it."""


def plot_matches(
    matches: Sequence[Match], *, split: Split, axis: Axis = "steps", baseline: str = "dense"
) -> Figure:
    """Plot tau against t: a panel per modality, a line per arm with its slope in the legend.

    The line and the shaded area under it end with a dot at the last loss the candidate reaches.

    Args:
        matches: From ``match_arms``; includes at least one arm on this split and axis. Matches on
            other splits and axes are not drawn.
        split: Split to draw.
        axis: Axis to draw.
        baseline: Name of the baseline.
    """
    drawn = [match for match in matches if (match.split, match.axis) == (split, axis)]
    # Assigned over all matches, so an arm has the same color in every plot.
    styles = _styles(list(dict.fromkeys(match.arm for match in matches)))
    modalities = list(dict.fromkeys(match.modality for match in drawn))
    num_arms = len({match.arm for match in drawn})
    # The legend also has a title and the baseline.
    figure, panels = _panels(
        modalities, f"Step matching: {SPLIT_TITLES[split]}", legend_lines=num_arms + 2
    )
    unit = _AXIS_TITLES[axis]
    for panel, modality in zip(panels, modalities, strict=True):
        of_panel = [match for match in drawn if match.modality == modality]
        end = max(match.baseline_end for match in of_panel)
        panel.plot([0, end], [0, end], "--", color=_BASELINE_COLOR, lw=1.3, label=f"{baseline}: 1")
        for match in of_panel:
            # Areas overlap, so they are lighter the more arms there are.
            _draw_match(panel, match, styles[match.arm], area=_AREA_ALPHA / len(of_panel))
        highest = max([end, *(match.tau[-1] for match in of_panel if match.points)])
        panel.set(xlim=(0, 1.02 * end), ylim=(0, 1.02 * highest), xlabel=f"{baseline}: {unit}")
        _dress(panel, axis)
        panel.yaxis.set_major_locator(MaxNLocator(5))
        panel.yaxis.set_major_formatter(panel.xaxis.get_major_formatter())
        panel.legend(
            title="slope (95% interval)" if any(match.interval for match in of_panel) else "slope",
            loc="upper center",
            bbox_to_anchor=(0.5, -0.16),
            **_LEGEND,
        )
    for panel in panels[::_PANELS_PER_ROW]:
        panel.set_ylabel(f"{unit} to reach the same loss")
    return figure


def plot_losses(arms: Mapping[str, Sequence[RunCurves]], *, split: Split) -> Figure:
    """Plot loss against steps, a panel per modality: arms' smoothed means, and thin single runs.

    Args:
        arms: Name -> its runs; the baseline first.
        split: Split to draw; at least one run has it.
    """
    modalities = list(
        dict.fromkeys(
            modality
            for runs in arms.values()
            for run in runs
            for found, modality in run.curves
            if found == split
        )
    )
    columns = min(len(arms), 2 * min(len(modalities), _PANELS_PER_ROW))
    figure, panels = _panels(
        modalities, SPLIT_TITLES[split].capitalize(), legend_lines=-(-len(arms) // columns)
    )
    baseline, *others = arms
    styles = {baseline: {"color": _BASELINE_COLOR, "ls": "-"}, **_styles(others)}
    for panel, modality in zip(panels, modalities, strict=True):
        lows, highs = [], []
        for name, runs in arms.items():
            curves = [curve for run in runs if (curve := run.curve(split, modality))]
            if curves:
                _draw_losses(panel, name, curves, styles[name])
                lows.append(min(curve.losses.min() for curve in curves))
                highs.append(max(map(_highest_after_beginning, curves)))
        margin = 0.04 * (max(highs) - min(lows))
        panel.set(xlim=(0, None), ylim=(min(lows) - margin, max(highs) + margin), xlabel="steps")
        _dress(panel, "steps")
    run = arms[baseline][0]
    units = [run.unit(modality) for modality in modalities]
    # One label per row says the unit of the whole row.
    every = _PANELS_PER_ROW if len(set(units)) == 1 else 1
    for panel, unit in list(zip(panels, units, strict=True))[::every]:
        panel.set_ylabel(unit)
    lines = {
        str(line.get_label()): line
        for panel in panels
        for line in panel.get_lines()
        if not str(line.get_label()).startswith("_")
    }
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=columns, **_LEGEND)
    return figure


def write_figures(figures: Mapping[str, Figure], directory: Path) -> list[Path]:
    """Write every figure to ``directory`` as NAME.png and as an image in its tensorboard/.

    Raises:
        OSError: A file cannot be written.
    """
    paths = []
    with SummaryWriter(str(directory / "tensorboard")) as writer:
        for name, figure in figures.items():
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
            # Drop the alpha channel; the background is opaque white.
            pixels = np.asarray(canvas.buffer_rgba())[:, :, :3]
            writer.add_image(f"step_matching/{name}", pixels, dataformats="HWC")
            path = directory / f"{name}.png"
            figure.savefig(path)
            paths.append(path)
    return paths


def _styles(arms: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return each arm's color and line style; the style changes when the colors repeat."""
    return {
        arm: {
            "color": _COLORS[number % len(_COLORS)],
            "ls": _LINE_STYLES[number // len(_COLORS) % len(_LINE_STYLES)],
        }
        for number, arm in enumerate(arms)
    }


def _panels(modalities: Sequence[str], title: str, legend_lines: int) -> tuple[Figure, list[Axes]]:
    columns = min(len(modalities), _PANELS_PER_ROW)
    rows = -(-len(modalities) // columns)
    width, height = _PANEL_INCHES
    height += _LEGEND_LINE_INCHES * legend_lines
    figure = Figure((columns * width, rows * height + 0.5), dpi=_DPI, layout="constrained")
    figure.suptitle(title, fontsize=_TITLE, weight="bold")
    grid = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for panel in grid[len(modalities) :]:
        panel.remove()
    panels = grid[: len(modalities)]
    for panel, modality in zip(panels, modalities, strict=True):
        panel.set_title(modality, fontsize=_TEXT + 1)
    return figure, panels


def _dress(panel: Axes, axis: Axis) -> None:
    """Set the ticks and grid of a panel."""
    panel.xaxis.set_major_locator(MaxNLocator(5))
    numbers = EngFormatter() if axis == "flops" else StrMethodFormatter("{x:,.0f}")
    panel.xaxis.set_major_formatter(numbers)
    panel.xaxis.label.set_fontsize(_TEXT)
    panel.yaxis.label.set_fontsize(_TEXT)
    panel.tick_params(labelsize=_SMALL, color="#999999")
    panel.grid(color="#E6E6E6", lw=0.8)
    panel.set_axisbelow(True)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def _draw_match(panel: Axes, match: Match, style: Mapping[str, Any], area: float) -> None:
    panel.plot(match.t, match.tau, lw=2.2, label=_label(match), **style)
    panel.fill_between(match.t, match.tau, color=style["color"], alpha=area, lw=0)
    panel.plot(match.t[-1:], match.tau[-1:], "o", ms=5, color=style["color"])


def _label(match: Match) -> str:
    if match.slope is None:
        why = "all losses reached before its first point" if match.range_reached else "none reached"
        return f"{match.arm}: {why}"
    label = f"{match.arm}: {match.slope:.3f}"
    if match.interval is not None:
        low, high = match.interval
        label += f" ({low:.3f} to {high:.3f})"
    if match.unreached:
        label += f", {match.range_reached:.0%} reached"
    return label


def _draw_losses(panel: Axes, name: str, curves: Sequence[Curve], style: Mapping[str, Any]) -> None:
    mean = smoothed_mean(curves)
    for curve in curves:
        panel.plot(curve.steps, curve.losses, lw=0.6, alpha=0.35, color=style["color"])
    label = f"{name} ({len(curves)} seeds)" if len(curves) > 1 else name
    panel.plot(mean.steps, mean.losses, lw=1.9, label=label, **style)


def _highest_after_beginning(curve: Curve) -> float:
    return float(curve.losses[curve.steps >= _BEGINNING * curve.steps[-1]].max())
