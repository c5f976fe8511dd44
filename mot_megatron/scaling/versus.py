"""Whole training steps of two versions of the program, or of two settings, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from mot_megatron.errors import DataError
from mot_megatron.scaling.measure import Point
from mot_megatron.scaling.report import Spread

THIS, OTHER = "this", "other"
"""The arms."""


@dataclass(frozen=True)
class StepRow:
    """Steps of one arm on one number of ranks."""

    arm: str
    world_size: int
    repeats: int
    seconds: Spread
    """Of a step: the median of each job."""
    ratio: Spread | None
    """This step over the other, of the jobs of the same repeat; None for the other."""
    memory_bytes: float
    """Peak of the fullest rank: allocated on a GPU, the whole process on a CPU."""
    sent_bytes: dict[str, float]
    """Bytes that the busiest rank sends per step, by cause; empty if the version counts none."""
    split_seconds: dict[str, float]
    """Seconds by cause of three additional steps, mean of the ranks and jobs; waiting included."""


def check_checkout(path: Path) -> None:
    """Check that a folder holds a version of the package that can run.

    Raises:
        DataError: It does not.
    """
    package = path / "mot_megatron"
    if not (package / "cli" / "train.py").is_file():
        raise DataError(f"--against {path}: no mot_megatron/cli/train.py there; give a checkout")
    if not list((package / "data").glob("_native*.so")):
        raise DataError(
            f"--against {path}: its extension is not built;"
            f" run `python setup.py build_ext --inplace` there"
        )


def step_rows(warmup: int, records: Mapping[Point, Mapping[str, Any]]) -> list[StepRow]:
    """Return a row per arm and number of ranks, those of one number of ranks together.

    Args:
        warmup: First steps of each job, which do not count.
        records: Record by job; failed jobs do not count.

    Raises:
        DataError: No job has succeeded.
    """
    good = {point: record for point, record in records.items() if "error" not in record}
    if not good:
        raise DataError("no job has succeeded; there is nothing to report")
    seconds = {point: median(record["step_seconds"][warmup:]) for point, record in good.items()}
    rows = []
    for size in sorted({point.world_size for point in good}):
        for arm in (THIS, OTHER):
            points = [p for p in good if (p.arm, p.world_size) == (arm, size)]
            if points:
                rows.append(_row(points, good, seconds))
    return rows


def _row(
    points: list[Point],
    records: Mapping[Point, Mapping[str, Any]],
    seconds: Mapping[Point, float],
) -> StepRow:
    arm, size = points[0].arm, points[0].world_size
    partners = {p: Point(OTHER, size, p.repeat) for p in points if arm == THIS}
    ratios = [seconds[p] / seconds[q] for p, q in partners.items() if q in seconds]
    of_points = [records[point] for point in points]
    sent = of_points[-1].get("sent_bytes", {})
    split: dict[str, float] = {}
    for record in of_points:
        for cause, of_ranks in record.get("split", {}).items():
            mean = sum(of_ranks) / len(of_ranks) / len(of_points)
            split[cause] = split.get(cause, 0.0) + mean
    return StepRow(
        arm,
        size,
        len(points),
        Spread.of([seconds[point] for point in points]),
        Spread.of(ratios) if ratios else None,
        max(record["peak_memory_bytes"] for record in of_points),
        {cause: max(of_ranks) for cause, of_ranks in sent.items()},
        split,
    )


def step_table(rows: list[StepRow], names: Mapping[str, str]) -> list[str]:
    """Return the rows as lines of text; ``names`` says what the arms are."""
    width = max(len(name) for name in names.values())
    lines = [
        f"{'ranks':>5}  {'version':{width}}  {'seconds per step':24} {'this / other':22}"
        f" {'memory':>8} {'sent':>9}"
    ]
    for row in rows:
        ratio = row.ratio.text(3) if row.ratio else ""
        sent = f"{sum(row.sent_bytes.values()) / 1e6:6.1f} MB" if row.sent_bytes else "?"
        lines.append(
            f"{row.world_size:5}  {names[row.arm]:{width}}  {row.seconds.text(3):24} {ratio:22}"
            f" {row.memory_bytes / 1e9:5.2f} GB {sent:>9}"
        )
    return lines


def split_table(rows: list[StepRow], names: Mapping[str, str]) -> list[str]:
    """Return where the time of the steps went, a line per row; small causes are left out."""
    lines = []
    for row in rows:
        total = sum(row.split_seconds.values())
        shares = [
            f"{cause} {spent / total:.1%}"
            for cause, spent in sorted(row.split_seconds.items(), key=lambda item: -item[1])
            if total and spent / total >= 0.001
        ]
        lines.append(f"{names[row.arm]}, {row.world_size} ranks: {', '.join(shares)}")
    return lines


def step_document(rows: list[StepRow], names: Mapping[str, str]) -> dict[str, Any]:
    """Return the rows for JSON."""
    return {"versions": dict(names), "rows": [asdict(row) for row in rows]}
