"""Report of a scaling measurement: figures, a page and plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mot_megatron.config import Config
from mot_megatron.errors import DataError
from mot_megatron.planning.arms import HYBRID, MIXTURE, MODEL, TWIN
from mot_megatron.planning.layouts import plan
from mot_megatron.planning.placing import tokens_of_towers
from mot_megatron.scaling.markdown import wrapped
from mot_megatron.scaling.measure import Point
from mot_megatron.scaling.split import mean_split, median_of, split_page, splits_of

STAMP = "MEASURED"
ARM_COLORS = {MODEL: "#0072B2", TWIN: "#4D4D4D", MIXTURE: "#D55E00", HYBRID: "#009E73"}
_PARTS = {"data": "#E69F00", "forward and backward": "#0072B2", "optimizer": "#009E73"}
_CAUSES = (
    *("#0072B2", "#009E73", "#E69F00", "#56B4E9", "#F0E442", "#CC79A7", "#D55E00", "#4D4D4D"),
    *("#999999", "#882255", "#DDCC77"),
)
"""Colors of the causes of a split, in their order."""
_VISIBLE = 0.005
"""Share below which a cause is left out of a plot."""
_WAITING, _WAITING_COLOR = "other ranks", "#CC79A7"


@dataclass(frozen=True)
class Spread:
    """Median and range of the repeats."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarize one value per repeat."""
        return cls(median(values), min(values), max(values))

    def text(self, digits: int = 0) -> str:
        """Return the median with the range."""
        low, middle, high = (f"{value:,.{digits}f}" for value in (self.low, self.median, self.high))
        return f"{middle} ({low} to {high})"


@dataclass(frozen=True)
class Row:
    """One arm on one number of ranks."""

    arm: str
    world_size: int
    repeats: int
    step_seconds: Spread
    tokens_per_gpu_second: Spread
    efficiency: float
    """Tokens per second and GPU over those of the same arm on the fewest ranks."""
    utilization: float
    """MFU: FLOPs per second over the peak of all devices."""
    parts: dict[str, float]
    """Share of the step by part, of the mean rank; the rest are waits for slower ranks."""
    imbalance: float
    """FLOPs of the busiest rank of a modality group over the group's mean."""
    peak_memory_bytes: int
    ratio: Spread | None
    """Step time over that of the dense twin, repeat by repeat; None without one."""
    modality_tokens_per_second: dict[str, float]
    """Tokens per second of each modality, over all ranks."""
    splits: dict[str, dict[str, float]]
    """Share of the step by role of a rank and cause; empty if it was not measured."""
    planned_memory_bytes: int | None
    """Device memory of the fullest rank by ``mot plan``, COUNTED; None without a configuration."""


def rows_of(description: Mapping[str, Any], records: Mapping[Point, dict[str, Any]]) -> list[Row]:
    """Return the figures of every arm and number of ranks that have a record.

    Raises:
        DataError: No job has ended well.
    """
    warmup = description["warmup"]
    good = {point: record for point, record in records.items() if "error" not in record}
    if not good:
        raise DataError("no job of this measurement has ended well yet")
    # Measured anew by every job on a CPU, where other work may have slowed it.
    peak = max(record["peak_flops_per_second"] / record["world_size"] for record in good.values())
    seconds = {point: median(record["step_seconds"][warmup:]) for point, record in good.items()}
    first: dict[str, float] = {}
    rows = []
    for arm, size in sorted(
        {(point.arm, point.world_size) for point in good},
        key=lambda key: (list(ARM_COLORS).index(key[0]), key[1]),
    ):
        mine = [point for point in good if (point.arm, point.world_size) == (arm, size)]
        some = [good[point] for point in mine]
        rates = Spread.of([_rate(good[point], warmup) for point in mine])
        base = first.setdefault(arm, rates.median)
        step = Spread.of([seconds[point] for point in mine])
        parts = {
            part: median(median(record["part_seconds"][part][warmup:]) for record in some)
            for part in some[0]["part_seconds"]
        }
        flops = median(median(record["flops"][warmup:]) for record in some)
        twins = {
            point: Point(TWIN, size, point.repeat)
            for point in mine
            if arm != TWIN and Point(TWIN, size, point.repeat) in good
        }
        rows.append(
            Row(
                arm=arm,
                world_size=size,
                repeats=len(mine),
                step_seconds=step,
                tokens_per_gpu_second=rates,
                efficiency=rates.median / base,
                utilization=flops / step.median / (peak * size),
                parts={part: value / step.median for part, value in parts.items()},
                imbalance=median(median(record["imbalance"][warmup:]) for record in some),
                peak_memory_bytes=max(record["peak_memory_bytes"] for record in some),
                ratio=Spread.of([seconds[point] / seconds[twin] for point, twin in twins.items()])
                if twins
                else None,
                modality_tokens_per_second={
                    name: median(
                        sum(record["tokens"][name][warmup:]) / sum(record["step_seconds"][warmup:])
                        for record in some
                    )
                    for name in some[0]["tokens"]
                },
                splits=median_of([splits_of(record) for record in some]),
                planned_memory_bytes=_planned(description, arm, size, some[0]),
            )
        )
    return rows


def _planned(
    description: Mapping[str, Any], arm: str, size: int, record: Mapping[str, Any]
) -> int | None:
    """Return the memory that the planner expects for the tokens of a job."""
    values = description.get("arms", {}).get(arm, {}).get(str(size))
    if values is None:
        return None
    config = Config.model_validate({**values, "run": {"name": "planned"}})
    tokens = {name: sum(counts) for name, counts in record["tokens"].items()}
    planned = plan(config, size, tokens_of_towers(config.model, tokens))
    return planned.needed[config.training.recompute]


def _rate(record: Mapping[str, Any], warmup: int) -> float:
    """Return the tokens per second and GPU, over all steps that count."""
    tokens = sum(sum(counts[warmup:]) for counts in record["tokens"].values())
    return tokens / sum(record["step_seconds"][warmup:]) / record["world_size"]


def document(
    description: Mapping[str, Any], rows: Sequence[Row], records: Mapping[Point, dict[str, Any]]
) -> dict[str, Any]:
    """Return all figures for ``scaling.json``."""
    return {
        "stamp": STAMP,
        "kind": kind_of(description),
        "rows": [asdict(row) for row in rows],
        "failed": {
            point.name: record["error"] for point, record in records.items() if "error" in record
        },
    }


def kind_of(description: Mapping[str, Any]) -> str:
    """Return the kind of scaling in words."""
    if description["weak"]:
        return "weak scaling: the tokens per rank and step are fixed"
    return "strong scaling: the tokens per step are fixed"


def page(
    description: Mapping[str, Any], rows: Sequence[Row], records: Mapping[Point, dict[str, Any]]
) -> str:
    """Return the report as Markdown."""
    some = next(record for record in records.values() if "error" not in record)
    versions = ", ".join(f"{name} {number}" for name, number in some["versions"].items())
    lines = [
        "# Scaling, measured",
        "",
        f"All numbers are {STAMP} unless marked otherwise; {kind_of(description)}. Each job ran"
        f" {description['steps']} steps after {description['warmup']} of warm-up; arms and numbers"
        " of ranks alternated. A cell has the median over the repeats and their range.",
        "",
        f"Devices: {', '.join(some['devices'])}. Software: {versions}.",
        "",
        "![Tokens per second, step ratio and parts of the step](scaling.png)",
        "",
        "| arm | ranks | repeats | seconds per step | tokens/s per rank | efficiency | MFU |"
        " memory, GB | planned, GB | step over dense twin's |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratio = row.ratio.text(3) if row.ratio else ""
        planned = row.planned_memory_bytes
        lines.append(
            f"| {row.arm} | {row.world_size} | {row.repeats} | {row.step_seconds.text(3)} |"
            f" {row.tokens_per_gpu_second.text()} | {row.efficiency:.1%} | {row.utilization:.1%} |"
            f" {row.peak_memory_bytes / 1e9:.2f} |"
            f" {'' if planned is None else f'{planned / 1e9:.2f}'} | {ratio} |"
        )
    lines += [
        "",
        "Efficiency is tokens per second and rank over those on the fewest ranks. MFU counts the"
        " active FLOPs without recomputation, over the data sheet's peak of a GPU or the measured"
        " speed of a large matrix product of a CPU. Planned memory (COUNTED, by `mot plan`) is that"
        " of weights, gradients, optimizer and activations on a GPU; on a CPU, the measured memory"
        " is that of the whole process.",
        "",
        "## Parts of a step",
        "",
        f"| arm | ranks | {' | '.join(_PARTS)} | {_WAITING} | imbalance of towers |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        shares = [f"{row.parts[part]:.1%}" for part in _PARTS]
        rest = f"{max(0.0, 1 - sum(row.parts.values())):.1%}"
        lines.append(
            f"| {row.arm} | {row.world_size} | {' | '.join(shares)} | {rest} |"
            f" {row.imbalance:.3f} |"
        )
    lines += split_page([(row.arm, row.world_size, row.splits) for row in rows])
    failed = {point: record for point, record in records.items() if "error" in record}
    if failed:
        lines += ["", "## Failed jobs", ""]
        lines += [f"- {point.name}: {record['error']}" for point, record in failed.items()]
    return wrapped([*lines, ""])


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw tokens per second, the step ratio and the parts of a step against the ranks."""
    has_ratio = any(row.ratio for row in rows)
    panels = 3 if has_ratio else 2
    figure = Figure(figsize=(4.4 * panels, 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, panels))
    _plot_rates(axes[0], rows)
    if has_ratio:
        _plot_ratio(axes[1], rows)
    _plot_parts(axes[-1], [row for row in rows if row.arm == MODEL])
    figure.savefig(path, dpi=150)


def _plot_rates(axes: Axes, rows: Sequence[Row]) -> None:
    for arm in dict.fromkeys(row.arm for row in rows):
        mine = [row for row in rows if row.arm == arm]
        sizes = [row.world_size for row in mine]
        rates = [row.tokens_per_gpu_second for row in mine]
        below = [rate.median - rate.low for rate in rates]
        above = [rate.high - rate.median for rate in rates]
        middle = [rate.median for rate in rates]
        color = ARM_COLORS[arm]
        axes.errorbar(sizes, middle, (below, above), color=color, marker="o", capsize=3, label=arm)
        axes.axhline(middle[0], color=color, linestyle=":", linewidth=1)
    axes.set(title="Throughput", ylabel="tokens/s per rank", ylim=(0, None))
    axes.plot([], [], color="gray", linestyle=":", label="ideal")
    rank_axis(axes, [row.world_size for row in rows])
    axes.legend(frameon=False, loc="lower left")


def _plot_ratio(axes: Axes, rows: Sequence[Row]) -> None:
    arms = list(dict.fromkeys(row.arm for row in rows if row.ratio))
    for arm in arms:
        mine = [(row.world_size, row.ratio) for row in rows if row.arm == arm and row.ratio]
        sizes = [size for size, _ in mine]
        middle = [ratio.median for _, ratio in mine]
        below = [ratio.median - ratio.low for _, ratio in mine]
        above = [ratio.high - ratio.median for _, ratio in mine]
        color = ARM_COLORS[arm]
        axes.errorbar(sizes, middle, (below, above), color=color, marker="o", capsize=3, label=arm)
    if len(arms) > 1:
        axes.legend(frameon=False, loc="lower left")
    axes.axhline(1.0, color=ARM_COLORS[TWIN], linestyle=":", linewidth=1)
    axes.set(title="Step time over the dense twin's", ylabel="ratio", ylim=(0, None))
    rank_axis(axes, [row.world_size for row in rows])


def _plot_parts(axes: Axes, rows: Sequence[Row]) -> None:
    names = [str(row.world_size) for row in rows]
    base = [0.0] * len(rows)
    if all(row.splits for row in rows):
        plot_splits(axes, names, [mean_split(row.splits) for row in rows])
        return
    for part, color in _PARTS.items():
        shares = [row.parts[part] for row in rows]
        axes.bar(names, shares, bottom=base, color=color, width=0.6, label=part)
        base = [low + share for low, share in zip(base, shares, strict=True)]
    rest = [max(0.0, 1 - low) for low in base]
    axes.bar(names, rest, bottom=base, color=_WAITING_COLOR, width=0.6, label=_WAITING)
    axes.set(title="Parts of the model's step", xlabel="ranks", ylabel="share", ylim=(0, 1))
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


def plot_splits(axes: Axes, names: Sequence[str], splits: Sequence[Mapping[str, float]]) -> None:
    """Draw a stacked bar of shares for each of ``names``; causes that are small are left out."""
    base = [0.0] * len(names)
    for number, cause in enumerate(splits[0]):
        shares = [max(0.0, split[cause]) for split in splits]
        if max(shares) < _VISIBLE:
            continue
        color = _CAUSES[number % len(_CAUSES)]
        axes.bar(names, shares, bottom=base, color=color, width=0.6, label=cause)
        base = [low + share for low, share in zip(base, shares, strict=True)]
    axes.set(title="Where the model's step goes", xlabel="ranks", ylabel="share", ylim=(0, 1))
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


def rank_axis(axes: Axes, sizes: Sequence[int]) -> None:
    """Give a plot a logarithmic axis of numbers of ranks."""
    sizes = sorted(set(sizes))
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel("ranks")
    axes.spines[["top", "right"]].set_visible(False)
