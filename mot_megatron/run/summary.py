"""summary.json: the results of a run in a form that programs can read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from mot_megatron.config import Config
from mot_megatron.config_model import BITS_PER_TOKEN, LossUnit
from mot_megatron.data.blend_stream import SourceProgress, progress_of_sources
from mot_megatron.data.statistics import ModalityStatistics, statistics_of
from mot_megatron.files import write_atomically
from mot_megatron.job.hardware import device_name
from mot_megatron.parallel.placement import Placement
from mot_megatron.train.session import Session
from mot_megatron.train.state import Progress
from mot_megatron.train.step import HeldOut

SUMMARY_FILE = "summary.json"
HELD_OUT_BITS, HELD_OUT_LOSS = "held_out_bits_per_token", "held_out_loss"
"""Key of a modality's held-out loss in bits per token, and in any other unit."""
CAUSALLY = "_causal"
"""Ending of these keys for the loss with causal routing."""


def write_summary(session: Session, progress: Progress, held_out: HeldOut, parameters: int) -> Path:
    """Write the summary to the run's folder and return its path; call this on one rank only.

    Args:
        session: The run.
        progress: Its progress.
        held_out: Losses on the held-out split.
        parameters: Number of parameters of the whole model.

    Raises:
        OSError: The file cannot be written; an older one is unchanged.
    """
    config, corpus = session.config, session.corpus
    statistics = statistics_of(corpus)
    seconds = progress.seconds
    summary = {
        "name": config.run.name,
        "corpus": corpus.description.name,
        "steps": progress.steps,
        "seconds": round(seconds, 3),
        "tokens": progress.tokens,
        "flops": None if math.isnan(progress.flops) else progress.flops,
        "tokens_per_second": round(progress.tokens / seconds, 1) if seconds else None,
        "parameters": parameters,
        "towers": list(config.model.tower_names),
        "world_size": session.groups.mesh.world_size,
        **layout_record(config, session.groups.placement),
        "precision": config.training.precision,
        "device": device_name(session.groups.device),
        "routed_with_later_tokens": config.model.sees_the_future,
        "modalities": {
            name: _modality(held_out, index, unit, statistics.get(name))
            for index, (name, unit) in enumerate(config.model.loss_units.items())
        },
    }
    if sources := progress_of_sources(session.loader.state_dict()):
        summary["sources"] = {each.name: _source(each, held_out, config) for each in sources}
    path = config.run_directory / SUMMARY_FILE
    write_atomically(path, json.dumps(summary, indent=1) + "\n")
    return path


def layout_record(config: Config, placement: Placement | None) -> dict[str, Any]:
    """Return the layout of a run, under the keys of the configuration.

    Values that apply only to interleaved pipelines or to modality parallelism are None without it.
    "placement" lists, per rank of a modality group, its share of each tower's tokens by tower name.
    """
    parallel = config.parallel
    shares = placement and [
        {
            name: share
            for name, share in zip(config.model.tower_names, row, strict=True)
            if share > 0
        }
        for row in placement.shares
    ]
    return {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "sequence_parallel": parallel.sequence_parallel,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size,
        "modality_parallel_size": parallel.modality_parallel_size,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "placement": shares,
        "attention_exchange": parallel.attention_exchange if placement else None,
        "zero_stage": parallel.zero_stage,
    }


def has_summary(run_directory: Path, steps: int) -> bool:
    """Return whether a run was finished after ``steps`` steps."""
    path = run_directory / SUMMARY_FILE
    if not path.is_file():
        return False
    try:
        return json.loads(path.read_text(encoding="utf-8"))["steps"] == steps
    except (ValueError, KeyError, TypeError):  # damaged; it will be rewritten
        return False


def mark_stale(run_directory: Path) -> None:
    """Mark an existing summary as stale, because the run is trained further.

    Raises:
        OSError: The file cannot be written.
    """
    path = run_directory / SUMMARY_FILE
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return
    if isinstance(summary, dict):
        write_atomically(path, json.dumps({**summary, "stale": True}, indent=1) + "\n")


def _modality(
    held_out: HeldOut, index: int, unit: LossUnit, statistics: ModalityStatistics | None
) -> dict[str, float | str | None]:
    """Return the held-out loss of the model, and of n-gram baselines (entropies) of tokens.

    Values that a modality without held-out tokens lacks are None. The loss with causal routing is
    included only if training routes differently and causal routing is possible.
    """
    key = HELD_OUT_BITS if unit == BITS_PER_TOKEN else HELD_OUT_LOSS
    losses: dict[str, float | str | None] = {key: _rounded(held_out.as_trained[index])}
    if held_out.causal is not None:
        losses[f"{key}{CAUSALLY}"] = _rounded(held_out.causal[index])
    if unit != BITS_PER_TOKEN:
        return {**losses, "unit": unit.name}
    entropies = statistics.all_tokens if statistics else None
    return {
        **losses,
        "unigram_entropy": round(entropies.unigram, 4) if entropies else None,
        "two_token_context_entropy": round(entropies.two_tokens, 4) if entropies else None,
    }


def _source(progress: SourceProgress, held_out: HeldOut, config: Config) -> dict[str, Any]:
    """Return what was read of a source, and its held-out losses if they were measured."""
    record: dict[str, Any] = {"tokens": progress.tokens, "epochs": round(progress.epochs, 4)}
    if (loss := held_out.sources.get(progress.name)) is not None:
        names = config.model.modalities
        record["held_out_loss"] = {
            name: _rounded(each) for name, each in zip(names, loss.of_modalities, strict=True)
        }
    return record


def _rounded(loss: float) -> float | None:
    return None if math.isnan(loss) else round(loss, 4)
