"""TensorBoard log of a scaling report: the number of ranks takes the place of the step."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from mot_megatron.scaling.report import Row
from mot_megatron.scaling.split import mean_split


def write_scalars(rows: Sequence[Row], directory: Path) -> None:
    """Write the figures of a report, one run per arm, in place of earlier ones."""
    shutil.rmtree(directory, ignore_errors=True)
    for arm in dict.fromkeys(row.arm for row in rows):
        with SummaryWriter(str(directory / arm.replace(" ", "-"))) as writer:
            for row in rows:
                if row.arm == arm:
                    for tag, value in _scalars(row).items():
                        writer.add_scalar(tag, value, row.world_size)


def _scalars(row: Row) -> dict[str, float]:
    found = {
        "scaling/seconds_per_step": row.step_seconds.median,
        "scaling/tokens_per_second_and_rank": row.tokens_per_gpu_second.median,
        "scaling/efficiency": row.efficiency,
        "scaling/mfu": row.utilization,
        "scaling/peak_memory_gb": row.peak_memory_bytes / 1e9,
    }
    if row.ratio is not None:
        found["scaling/step_over_dense_twin"] = row.ratio.median
    for name, rate in row.modality_tokens_per_second.items():
        found[f"tokens_per_second/{name}"] = rate
    if row.splits:
        for cause, share in mean_split(row.splits).items():
            found[f"split/{cause.replace(' ', '_')}"] = share
    return found
