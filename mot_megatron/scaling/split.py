"""Where the time of measured steps went, by the role of a rank, and what would help."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from mot_megatron.parallel.mesh import Mesh
from mot_megatron.run.step_clock import (
    COMPUTE,
    EXCHANGE,
    GRADIENTS,
    WAITING,
    WEIGHTS,
    without_waiting,
)

PADDING = "padding"
Split = dict[str, float]
"""Share of a step by cause; they sum to 1."""

_ADVICE = {
    "tensor-parallel traffic": "a smaller `parallel.tensor_model_parallel_size`, at most the ranks"
    " of a node",
    EXCHANGE: "`parallel.modality_parallel_size` inside of a node, or"
    ' `parallel.attention_exchange = "heads"`',
    "pipeline messages and bubble": "more micro-batches per step, or"
    " `parallel.virtual_pipeline_model_parallel_size`",
    "expert dispatch": "a smaller `parallel.expert_model_parallel_size`",
    GRADIENTS: "more tokens per step (`training.global_batch_size`), or tensor and pipeline"
    " parallelism, which leave fewer weights per rank",
    WEIGHTS: "a larger global batch, or `parallel.zero_stage` 1 instead of 3",
    WAITING: '`data.packing = "budget"`, which gives all ranks equally many tokens of each tower',
    "optimizer": "a larger global batch, or more data-parallel ranks to share the update",
    "data": "a corpus on a faster disk, or in memory",
    PADDING: "documents that fill sequences better, or a longer `data.seq_length`",
}


def splits_of(record: Mapping[str, Any]) -> dict[str, Split]:
    """Return the split of a job's steps by role: pipeline stage and place in a modality group.

    Empty if the job did not split its steps.
    """
    of_ranks = record.get("split")
    if not of_ranks:
        return {}
    parallel, size = record["parallel"], record["world_size"]
    mesh = Mesh(
        size,
        parallel["tensor_model_parallel_size"],
        parallel["pipeline_model_parallel_size"],
        parallel["modality_parallel_size"],
    )
    by_role: dict[str, list[Split]] = {}
    for rank in range(size):
        role = []
        if mesh.pipeline > 1:
            role.append(f"stage {mesh.pipeline_rank(rank)}")
        if mesh.modality > 1:
            role.append(f"place {mesh.modality_rank(rank)}")
        split = {cause: seconds[rank] for cause, seconds in of_ranks.items()}
        by_role.setdefault(", ".join(role) or "all", []).append(split)
    counts = record["tokens"].values()
    steps = len(next(iter(counts)))
    filled = sum(map(sum, counts)) / (steps * record["positions"])
    found = {}
    for role, splits in by_role.items():
        mean = without_waiting(splits, exchange=min(of_ranks[EXCHANGE]))
        mean[PADDING] = (1 - filled) * mean[COMPUTE]
        mean[COMPUTE] -= mean[PADDING]
        total = sum(mean.values())
        found[role] = {cause: seconds / total for cause, seconds in mean.items()}
    return found


def median_of(repeats: Sequence[Mapping[str, Split]]) -> dict[str, Split]:
    """Return the median over repeats of each share, scaled so that shares sum to 1 again."""
    repeats = [splits for splits in repeats if splits]
    if not repeats:
        return {}
    found = {}
    for role, causes in repeats[0].items():
        shares = {cause: median(splits[role][cause] for splits in repeats) for cause in causes}
        total = sum(shares.values())
        found[role] = {cause: share / total for cause, share in shares.items()}
    return found


def mean_split(roles: Mapping[str, Split]) -> Split:
    """Return the mean over roles, which have equally many ranks."""
    return {
        cause: sum(split[cause] for split in roles.values()) / len(roles)
        for cause in next(iter(roles.values()))
    }


def advice(split: Split) -> str:
    """Return which part of a step costs most apart from computation, and what would help."""
    causes = {cause: share for cause, share in split.items() if cause != COMPUTE}
    worst = max(causes, key=lambda cause: causes[cause])
    return f"{worst} {causes[worst]:.0%} of the step; what would help: {_ADVICE[worst]}"


def split_page(rows: Sequence[tuple[str, int, Mapping[str, Split]]]) -> list[str]:
    """Return the lines of a section of the report.

    Args:
        rows: Arm, number of ranks, and split by role.
    """
    rows = [row for row in rows if row[2]]
    if not rows:
        return []
    causes = [
        cause
        for cause in next(iter(rows[0][2].values()))
        if any(abs(split[cause]) >= 5e-4 for *_, roles in rows for split in roles.values())
    ]
    lines = [
        "",
        "## Where the time goes",
        "",
        "Shares of a step of additional steps, in which each rank timed its collectives. The time"
        " of a collective is that of the rank that came last to it; what the others waited for it"
        f" is *{WAITING}*. Padding is its part of the computation.",
        "",
        f"| arm | ranks | role | {' | '.join(causes)} |",
        f"|---|---|---|{'---|' * len(causes)}",
    ]
    for arm, size, roles in rows:
        for role, split in roles.items():
            shares = " | ".join(f"{split[cause]:.1%}" for cause in causes)
            lines.append(f"| {arm} | {size} | {role} | {shares} |")
    lines += ["", "The largest part apart from computation:", ""]
    for arm, size, roles in rows:
        slowest = max(roles.values(), key=lambda split: 1 - split[WAITING])
        lines.append(f"- {arm}, {size} rank{'s' if size > 1 else ''}: {advice(slowest)}.")
    return lines
