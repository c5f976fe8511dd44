"""summary.json: what a run reached, for whoever tracks results by machine."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from mot_megatron.data.statistics import ModalityStatistics, measure_corpus
from mot_megatron.errors import TrainingError
from mot_megatron.train.hardware import device_name
from mot_megatron.train.session import Session
from mot_megatron.train.state import Progress

SUMMARY_FILE = "summary.json"


def write_summary(
    session: Session, progress: Progress, held_out_bits: tuple[float, ...], parameters: int
) -> Path:
    """Write the summary into the run's folder and return its path; on one rank only.

    Args:
        session: The run.
        progress: How far it has come.
        held_out_bits: Held-out loss of every modality, bits per token; NaN without labels.
        parameters: Of the whole model.

    Raises:
        TrainingError: It cannot be written; an older one stays.
    """
    config, corpus = session.config, session.corpus
    statistics = measure_corpus(corpus)
    seconds = progress.seconds
    summary = {
        "name": config.run.name,
        "corpus": corpus.description.name,
        "steps": progress.steps,
        "seconds": round(seconds, 3),
        "tokens": progress.tokens,
        "tokens_per_second": round(progress.tokens / seconds, 1) if seconds else None,
        "parameters": parameters,
        "towers": list(config.model.tower_names),
        "world_size": session.groups.mesh.world_size,
        "tensor_model_parallel_size": session.groups.tensor_size,
        "zero_stage": config.parallel.zero_stage,
        "precision": config.training.precision,
        "device": device_name(session.groups.device),
        "modalities": {
            name: _modality(bits, statistics[name])
            for name, bits in zip(config.model.modalities, held_out_bits, strict=True)
        },
    }
    path = config.run_directory / SUMMARY_FILE
    unfinished = path.with_name(SUMMARY_FILE + ".tmp")
    try:
        unfinished.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        raise TrainingError(f"{path}: cannot be written: {error.strerror}") from error
    return path


def has_summary(run_directory: Path, steps: int) -> bool:
    """Whether the run there has been finished at ``steps`` steps."""
    path = run_directory / SUMMARY_FILE
    return path.is_file() and json.loads(path.read_text(encoding="utf-8"))["steps"] == steps


def _modality(bits: float, statistics: ModalityStatistics) -> dict[str, Any]:
    """Bits per token of the held-out split: the model's beside those of counting tables."""
    return {
        "held_out_bits_per_token": None if math.isnan(bits) else round(bits, 4),
        "unigram_entropy": round(statistics.all_tokens.unigram, 4),
        "two_token_context_entropy": round(statistics.all_tokens.two_tokens, 4),
    }
