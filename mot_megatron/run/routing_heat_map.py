"""A heat map of the share of a tower's tokens that each expert takes, per layer.

The figure is made without pyplot, so it needs no display and is freed when it is no longer used.
"""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

_CELL_INCHES = (0.62, 0.36)
_SMALL_CELL_INCHES = (0.14, 0.14)
_MOST_NUMBERED = 40
"""Largest number of experts or layers for which cells are large enough for their numbers."""
_LEFT_INCHES, _BELOW_INCHES, _ABOVE_INCHES, _GAP_INCHES = 0.8, 0.58, 0.62, 0.22
_BAR_INCHES = (0.16, 0.75)
"""Width of the color bar and of its labels."""
_NARROWEST_INCHES = 4.2
"""Minimum width, so that the title fits."""
_LOWEST_INCHES = 1.1
_COLORS, _UNTAKEN_COLORS = "Blues", "Oranges"
_SMALL, _TITLE = 8.5, 11
_DPI = 110


def draw_heat_map(
    title: str, taken: np.ndarray, untaken: np.ndarray | None, equal: float
) -> Figure:
    """Draw experts from left to right and layers from top to bottom.

    Args:
        title: Title of the picture.
        taken: [L, E] percent of the tower's tokens that each expert takes.
        untaken: [L] percent that no expert takes, drawn as a separate column; None if every token
            has an expert.
        equal: Percent that each expert would take if all took the same number.
    """
    numbered = max(taken.shape) <= _MOST_NUMBERED
    width, height = _CELL_INCHES if numbered else _SMALL_CELL_INCHES
    columns = [taken.shape[1] * width, _BAR_INCHES[0]]
    if untaken is not None:
        columns.insert(1, _CELL_INCHES[0])
    figure, places = _frame(columns, max(taken.shape[0] * height, _LOWEST_INCHES))
    # An equal share is never darker than the middle of the scale, so overload stands out.
    scale = Normalize(0, max(2 * equal, taken.max()))
    cells = places[0]
    _draw_cells(cells, taken, scale, _COLORS, numbered)
    cells.set_ylabel("layer")
    cells.set_xlabel("expert")
    cells.yaxis.set_major_locator(MaxNLocator(nbins=16, integer=True))
    cells.xaxis.set_major_locator(MaxNLocator(nbins=32, integer=True))
    if untaken is not None:
        _draw_cells(places[1], untaken[:, None], Normalize(0, 100), _UNTAKEN_COLORS, numbered)
        places[1].set_xticks([0], ["none"])
        places[1].set_yticks([])
    _draw_bar(figure, places[-1], scale, equal)
    inches = figure.get_size_inches()
    left = _LEFT_INCHES / inches[0]
    figure.text(left, 1 - 0.14 / inches[1], title, fontsize=_TITLE, va="top", fontweight="bold")
    subtitle = f"percent of tokens; equal shares: {equal:.3g}%"
    figure.text(left, 1 - 0.38 / inches[1], subtitle, fontsize=_SMALL, va="top", color="0.35")
    return figure


def _frame(columns: list[float], height: float) -> tuple[Figure, list[Axes]]:
    """Return a figure with axes side by side, with these widths and this height in inches."""
    needed = _LEFT_INCHES + sum(columns) + _GAP_INCHES * (len(columns) - 1) + _BAR_INCHES[1]
    total = (max(needed, _NARROWEST_INCHES), _BELOW_INCHES + height + _ABOVE_INCHES)
    figure = Figure(figsize=total, dpi=_DPI)
    FigureCanvasAgg(figure)
    places, x = [], _LEFT_INCHES
    for width in columns:
        box = (x / total[0], _BELOW_INCHES / total[1], width / total[0], height / total[1])
        places.append(figure.add_axes(box))
        x += width + _GAP_INCHES
    return figure, places


def _draw_bar(figure: Figure, axes: Axes, scale: Normalize, equal: float) -> None:
    """Draw the color scale, with a line at equal shares."""
    bar = figure.colorbar(ScalarMappable(scale, _COLORS), cax=axes)
    axes.yaxis.set_major_formatter(PercentFormatter())
    axes.axhline(equal, color="black", linewidth=1)
    axes.tick_params(labelsize=_SMALL, length=2)
    bar.outline.set_visible(False)  # type: ignore[operator]


def _draw_cells(
    axes: Axes, percent: np.ndarray, scale: Normalize, colors: str, numbered: bool
) -> None:
    axes.imshow(percent, cmap=colors, norm=scale, aspect="auto", interpolation="nearest")
    axes.tick_params(length=0, labelsize=_SMALL)
    axes.spines[:].set_visible(False)
    # White lines between the cells.
    axes.set_xticks(np.arange(percent.shape[1] + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(percent.shape[0] + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5 if numbered else 0.3)
    axes.tick_params(which="minor", length=0)
    if not numbered:
        return
    for (row, column), value in np.ndenumerate(percent):
        dark = scale(value) > 0.6
        axes.text(
            column, row, f"{value:.1f}", ha="center", va="center", fontsize=_SMALL,
            color="white" if dark else "0.15",
        )  # fmt: skip
