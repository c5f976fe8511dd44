"""What a run does about a step with a problem: it stops, skips the step, or goes back.

The update was not made. The batch is written down, so that bad documents, or a device that computes
wrongly, can be found: the same documents fail again in the first case, and do not in the second.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from dataclasses import dataclass
from typing import Literal

from mot_megatron.checkpoint.find import Search, resolve_resume
from mot_megatron.data.streams import Position
from mot_megatron.errors import TrainingError
from mot_megatron.train.session import TRAIN_SPLIT, Session
from mot_megatron.train.state import Progress, checkpoint_directory, restore
from mot_megatron.train.step import StepResult

SPIKES_FILE = "spikes.jsonl"
"""File in the run's folder with one step with a problem per line."""
MOST_SKIPPED = 10
"""Steps in a row that are skipped; then the loss has not spiked but risen."""


@dataclass(frozen=True)
class Act:
    """What is done about a step with a problem."""

    kind: Literal["stop", "skip", "rollback"]
    why: str = ""
    """Why the run stops although it should skip or go back."""


def choose_act(session: Session, progress: Progress) -> Act:
    """Return what to do about the step after ``progress``; equal on all ranks."""
    training = session.config.training
    if training.on_spike == "skip":
        if progress.skipped_in_a_row >= MOST_SKIPPED:
            return Act("stop", f"; {MOST_SKIPPED} steps in a row were skipped already")
        return Act("skip")
    if training.on_spike == "rollback":
        if progress.rollbacks >= training.max_rollbacks:
            return Act("stop", f"; training.max_rollbacks = {training.max_rollbacks} are used up")
        return Act("rollback")
    return Act("stop")


def write_down(
    session: Session, act: Act, step: int, result: StepResult, position: Position
) -> None:
    """Append the step to ``spikes.jsonl``; call this on the first rank.

    Args:
        session: The run.
        act: What is done about it.
        step: Number of the step, counted from 1.
        result: Its result.
        position: Position in the data before the step.
    """
    config = session.config
    modalities = zip(config.model.modalities, result.modality_losses, strict=True)
    line = {
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "step": step,
        "act": act.kind,
        "problem": result.problem,
        "loss": _finite(result.total_loss),
        "loss_of_modalities": {name: _finite(loss) for name, loss in modalities},
        "gradient_norm": _finite(result.norms.total),
        "gradient_norm_of_towers": [_finite(norm) for norm in result.norms.per_tower],
        "split": TRAIN_SPLIT,
        **(
            {"window": position["window"]} if "window" in position else {"epoch": position["epoch"]}
        ),
        "first_sequence": position["next_sequence"],
        "documents": session.loader.documents_at(position, config.training.global_batch_size),
    }
    # The console has the essence if the disk is full.
    with contextlib.suppress(OSError), (config.run_directory / SPIKES_FILE).open("a") as file:
        file.write(json.dumps(line, allow_nan=False) + "\n")


def _finite(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def go_back(session: Session, progress: Progress, problem: str) -> tuple[Progress, Search]:
    """Restore the newest checkpoint, but stay behind the batches read since. Collective.

    Args:
        session: The run.
        progress: Its progress.
        problem: Why it goes back, for the error.

    Returns:
        The progress of the checkpoint, and the search that found it.

    Raises:
        TrainingError: There is no checkpoint yet.
        CheckpointError: None can be used.
    """
    position = session.loader.state_dict()
    search = resolve_resume(checkpoint_directory(session.config.run_directory))
    if search.checkpoint is None:
        raise TrainingError(
            f'{problem}; training.on_spike = "rollback": there is no checkpoint to go back to yet'
        )
    restored = restore(session, search.checkpoint)
    session.loader.load_state_dict(position)
    restored.rollbacks = progress.rollbacks + 1
    return restored, search
