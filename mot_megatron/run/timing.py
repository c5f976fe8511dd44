"""Timed training steps: real steps of a run that neither saves, evaluates, samples nor logs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mot_megatron.checkpoint.agreement import on_first_rank
from mot_megatron.config import Config
from mot_megatron.data.corpus import Corpus
from mot_megatron.errors import TrainingError
from mot_megatron.files import write_atomically
from mot_megatron.job.hardware import (
    describe_machine,
    device_name,
    peak_flops,
    peak_memory_of_fullest_rank,
)
from mot_megatron.job.progress_report import ProgressReport
from mot_megatron.job.stop import StopRequest
from mot_megatron.parallel.groups import ProcessGroups
from mot_megatron.train.agreement import package_versions
from mot_megatron.train.session import build_session
from mot_megatron.train.step import StepResult, train_step

PARTS = ("data", "forward and backward", "optimizer")


def time_steps(
    config: Config,
    corpus: Corpus,
    groups: ProcessGroups,
    output: Path,
    progress_report: ProgressReport,
    stop: StopRequest,
) -> None:
    """Run ``training.train_steps`` steps and write their times. Collective over the world.

    Nothing else is written: no run folder, no checkpoint. The seconds of a part of a step are the
    mean over ranks; those of a whole step belong to the slowest rank.

    Args:
        config: Resolved configuration.
        corpus: The corpus that it names.
        groups: Process groups of this rank.
        output: JSON file, written by rank 0.
        progress_report: Receives the current phase of this rank.
        stop: Source of stop requests.

    Raises:
        TrainingError: A stop was requested, or the file cannot be written.
    """
    session = build_session(config, corpus, groups, progress_report)
    results = []
    for step in range(1, config.training.train_steps + 1):
        rate = session.schedule.at(step - 1)
        results.append(train_step(session, step=step, learning_rate=rate, stop=stop.requested))
        if results[-1].counts.stop:
            raise TrainingError(
                f"stopped after step {step}/{config.training.train_steps}; no times were written"
            )
    document = _document(config, groups, results)
    on_first_rank(lambda: _write(output, document))


def _document(config: Config, groups: ProcessGroups, results: list[StepResult]) -> dict[str, Any]:
    """Gather the times of all ranks."""
    own = [(r.seconds.data, r.seconds.forward_backward, r.seconds.optimizer) for r in results]
    mine = torch.tensor(own, dtype=torch.float64, device=groups.device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    seconds = torch.stack(everyone).cpu()  # [ranks, steps, parts]
    names = [""] * dist.get_world_size()
    dist.all_gather_object(names, device_name(groups.device))
    precision = config.training.precision
    return {
        "world_size": dist.get_world_size(),
        "parallel": config.parallel.model_dump(mode="json", exclude_none=True),
        "micro_batches": config.accumulation_steps(groups.data_size),
        "step_seconds": seconds.sum(2).amax(0).tolist(),
        "part_seconds": dict(zip(PARTS, seconds.mean(0).T.tolist(), strict=True)),
        "tokens": {
            name: [result.counts.modality_tokens[index] for result in results]
            for index, name in enumerate(config.model.modalities)
        },
        "flops": [result.counts.flops(config.model) for result in results],
        "imbalance": [result.counts.imbalance for result in results],
        "peak_flops_per_second": peak_flops(groups.device, precision) * dist.get_world_size(),
        "peak_memory_bytes": peak_memory_of_fullest_rank(groups.device),
        "devices": sorted(set(names)),
        "machine": describe_machine(groups.device),
        "versions": package_versions(),
    }


def _write(output: Path, document: dict[str, Any]) -> None:
    try:
        write_atomically(output, json.dumps(document, indent=1) + "\n")
    except OSError as error:
        raise TrainingError(f"--benchmark {output}: cannot be written: {error.strerror}") from None
