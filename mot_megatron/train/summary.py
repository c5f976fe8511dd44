"""summary.json: what a run reached, for whoever tracks results by machine."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from mot_megatron.data.statistics import Entropies, held_out_entropies
from mot_megatron.train.console import duration
from mot_megatron.train.hardware import device_name
from mot_megatron.train.session import Session
from mot_megatron.train.state import Progress

SUMMARY_FILE = "summary.json"


def summarise(
    session: Session, progress: Progress, held_out_bits: tuple[float, ...], num_parameters: int
) -> dict[str, Any]:
    """The summary of a run as JSON holds it."""
    names = [modality.name for modality in session.corpus.description.modalities]
    entropies = held_out_entropies(session.corpus)
    return {
        "name": session.config.run.name,
        "steps": progress.steps,
        "seconds": round(progress.seconds, 3),
        "tokens": progress.tokens,
        "tokens_per_second": round(progress.tokens / progress.seconds, 1)
        if progress.seconds
        else None,
        "parameters": num_parameters,
        "world_size": session.groups.mesh.world_size,
        "tensor_model_parallel_size": session.groups.tensor_size,
        "device": device_name(session.groups.device),
        "corpus": session.corpus.description.name,
        "modalities": {
            name: _modality(bits, entropies[name])
            for name, bits in zip(names, held_out_bits, strict=True)
        },
    }
