"""Timed training steps: real steps of a run that neither saves, evaluates, samples nor logs."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mot_megatron.checkpoint.agreement import on_first_rank
from mot_megatron.config import Config
from mot_megatron.errors import TrainingError
from mot_megatron.files import write_atomically
from mot_megatron.job.hardware import (
    describe_machine,
    device_name,
    peak_flops,
    peak_memory_of_fullest_rank,
)
from mot_megatron.job.stop import StopRequest
from mot_megatron.parallel.axes import axes_of
from mot_megatron.parallel.gather import values_of_all_ranks
from mot_megatron.parallel.groups import ProcessGroups
from mot_megatron.run.step_clock import CAUSES, TRAFFIC, StepClock, split_step
from mot_megatron.train.agreement import package_versions
from mot_megatron.train.session import Trainer, build_schedule
from mot_megatron.train.step import StepResult, train_step

PARTS = ("data", "forward and backward", "optimizer")


SPLIT_STEPS = 3
"""Additional steps, whose time is split by cause."""


def time_steps(trainer: Trainer, output: Path, stop: StopRequest) -> None:
    """Run ``training.train_steps`` steps; write their times and losses. Collective over the world.

    Nothing else is written: no run folder, no checkpoint. The seconds of a part of a step are the
    mean over ranks; those of a whole step belong to the slowest rank. SPLIT_STEPS further steps are
    split by cause on every rank, and what the rank sends in one of them is counted.

    Args:
        trainer: Model, optimizer and data.
        output: JSON file, written by rank 0.
        stop: Source of stop requests.

    Raises:
        TrainingError: A stop was requested, or the file cannot be written.
    """
    config, groups = trainer.config, trainer.groups
    schedule = build_schedule(config)
    count = config.training.train_steps
    axes = axes_of(groups, config.model.tower_names)
    clock = StepClock(axes, trainer.progress_report, groups.device)
    results, splits, sent = [], [], []
    for step in range(1, count + SPLIT_STEPS + 1):
        rate = schedule.at(min(step, count) - 1)
        with clock if step > count else contextlib.nullcontext():
            result = train_step(trainer, step=step, learning_rate=rate, stop=stop.requested)
        if result.counts.stop:
            raise TrainingError(f"stopped after step {step}/{count}; no times were written")
        if step > count:
            splits.append(split_step(result.seconds, clock.take()))
            sent.append(clock.take_sent())
        else:
            results.append(result)
    document = _document(config, groups, results)
    document["split"] = _gathered(splits, CAUSES)
    document["sent_bytes"] = _gathered(sent, TRAFFIC)
    on_first_rank(lambda: _write(output, document))


def _gathered(
    steps: Sequence[Mapping[str, float]], causes: Sequence[str]
) -> dict[str, list[float]]:
    """Return the values by cause, for each rank the mean over its steps. Collective."""
    mine = {cause: sum(step[cause] for step in steps) / len(steps) for cause in causes}
    everyone = values_of_all_ranks(mine)
    return {cause: [step[cause] for step in everyone] for cause in causes}


def _document(config: Config, groups: ProcessGroups, results: list[StepResult]) -> dict[str, Any]:
    """Gather the times of all ranks."""
    own = [(r.seconds.data, r.seconds.forward_backward, r.seconds.optimizer) for r in results]
    mine = torch.tensor(own, dtype=torch.float64, device=groups.device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    seconds = torch.stack(everyone).cpu()  # [ranks, steps, parts]
    precision = config.training.precision
    return {
        "world_size": dist.get_world_size(),
        "positions": config.training.global_batch_size * config.data.seq_length,
        "parallel": config.parallel.model_dump(mode="json", exclude_none=True),
        "micro_batches": config.accumulation_steps(groups.data_size),
        "step_seconds": seconds.sum(2).amax(0).tolist(),
        "part_seconds": dict(zip(PARTS, seconds.mean(0).T.tolist(), strict=True)),
        "tokens": {
            name: [result.counts.modality_tokens[index] for result in results]
            for index, name in enumerate(config.model.modalities)
        },
        "flops": [result.counts.flops(config.model) for result in results],
        "total_bits": [result.total_loss for result in results],
        "imbalance": [result.counts.imbalance for result in results],
        "peak_flops_per_second": peak_flops(groups.device, precision) * dist.get_world_size(),
        "peak_memory_bytes": peak_memory_of_fullest_rank(groups.device),
        "devices": sorted(set(values_of_all_ranks(device_name(groups.device)))),
        "machine": describe_machine(groups.device),
        "versions": package_versions(),
    }


def _write(output: Path, document: dict[str, Any]) -> None:
    try:
        write_atomically(output, json.dumps(document, indent=1) + "\n")
    except OSError as error:
        raise TrainingError(f"--benchmark {output}: cannot be written: {error.strerror}") from None
