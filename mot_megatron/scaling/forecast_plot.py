"""Plots of forecasts: throughput, step ratio and where the time of a step goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mot_megatron.planning.arms import MODEL, TWIN
from mot_megatron.scaling.forecast import Forecast
from mot_megatron.scaling.report import ARM_COLORS, plot_splits, rank_axis


def plot_forecasts(forecasts: Mapping[str, Sequence[Forecast]], machine: str, path: Path) -> None:
    """Draw the forecasts for one machine against the number of GPUs.

    Args:
        forecasts: By arm.
        machine: Its name, for the title.
        path: PNG file.
    """
    twins = forecasts.get(TWIN)
    panels = 3 if twins else 2
    figure = Figure(figsize=(4.4 * panels, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"FORECAST on {machine}")
    axes = list(figure.subplots(1, panels))
    sizes = [one.world_size for one in forecasts[MODEL]]
    for arm, found in forecasts.items():
        rates = [one.tokens_per_gpu_second for one in found]
        axes[0].plot(sizes, rates, color=ARM_COLORS[arm], marker="o", label=arm)
        axes[0].axhline(rates[0], color=ARM_COLORS[arm], linestyle=":", linewidth=1)
        if twins and arm != TWIN:
            ratios = [one.seconds / twin.seconds for one, twin in zip(found, twins, strict=True)]
            axes[1].plot(sizes, ratios, color=ARM_COLORS[arm], marker="o", label=arm)
    axes[0].plot([], [], color="gray", linestyle=":", label="ideal")
    axes[0].set(title="Throughput", ylabel="tokens/s per GPU", ylim=(0, None))
    axes[0].legend(frameon=False, loc="lower left")
    if twins:
        axes[1].axhline(1.0, color=ARM_COLORS[TWIN], linestyle=":", linewidth=1)
        axes[1].set(title="Step time over the dense twin's", ylabel="ratio", ylim=(0, None))
        axes[1].legend(frameon=False, loc="lower left")
    for each in axes[:-1]:
        rank_axis(each, sizes)
    causes = dict.fromkeys(cause for one in forecasts[MODEL] for cause in one.split)
    shares = [
        {cause: one.split.get(cause, 0.0) / one.seconds for cause in causes}
        for one in forecasts[MODEL]
    ]
    plot_splits(axes[-1], [f"{size:,}" for size in sizes], shares)
    figure.savefig(path, dpi=150)
