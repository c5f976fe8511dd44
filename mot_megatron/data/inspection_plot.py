"""A picture of the lengths of documents and of their segments."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_BINS = 40
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def plot_lengths(
    documents: Mapping[str, np.ndarray], segments: Mapping[str, np.ndarray], name: str, path: Path
) -> None:
    """Draw two histograms.

    Args:
        documents: Tokens of each document, by split.
        segments: Tokens of each segment of training documents, by modality.
        name: Name of the corpus, for the title.
        path: PNG file.

    Raises:
        OSError: The file cannot be written.
    """
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(name)
    panels = zip(figure.subplots(1, 2), (documents, segments), ("document", "segment"), strict=True)
    for panel, lengths, what in panels:
        present = {key: values for key, values in lengths.items() if len(values)}
        longest = max((int(values.max()) for values in present.values()), default=1)
        shortest = min((int(values.min()) for values in present.values()), default=1)
        logarithmic = longest > 20 * shortest
        edges = np.linspace(0, longest + 1, _BINS + 1)
        if logarithmic:
            edges = np.geomspace(shortest, longest + 1, _BINS + 1)
            panel.set_xscale("log")
        for (key, values), color in zip(present.items(), _COLORS * len(present), strict=False):
            shares = np.full(len(values), 1 / len(values))
            label = f"{key}: {len(values):,}, median {np.median(values):,.0f}"
            panel.hist(values, edges, weights=shares, histtype="step", lw=1.8, color=color)
            panel.plot([], [], color=color, lw=1.8, label=label)
        panel.set(xlabel=f"tokens of a {what}", ylabel=f"share of {what}s")
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_ylim(0, 1.35 * panel.get_ylim()[1])
        panel.legend(frameon=False, loc="upper right")
    figure.savefig(path, dpi=120)
