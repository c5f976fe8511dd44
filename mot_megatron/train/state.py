"""Save and restore the state of a run: weights, optimizer state, position in the data, progress.

The names of tensors are in ``checkpoint.names``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from mot_megatron.checkpoint.background import Save
from mot_megatron.checkpoint.find import CheckpointInfo, read_metadata
from mot_megatron.checkpoint.load import load_checkpoint
from mot_megatron.checkpoint.names import (
    CONTENTS,
    STATE_KINDS,
    WEIGHT_PREFIX,
    WEIGHTS_ONLY,
    checkpoint_directory,
)
from mot_megatron.checkpoint.save import Background, Keep, save_checkpoint
from mot_megatron.checkpoint.tensors import NamedTensor
from mot_megatron.errors import CheckpointError, TrainingError
from mot_megatron.model.sharding import experts_of, parts_of, sharding_of
from mot_megatron.parallel.gather import values_of_all_ranks
from mot_megatron.parallel.groups import ProcessGroups
from mot_megatron.train.session import Session
from mot_megatron.train.staging import StagedState, Staging

_BROKEN_NAMES = 20
"""Names of broken parameters that a rank tells the others."""


@dataclass
class Progress:
    """Progress of a run since its first step, across resumptions."""

    steps: int = 0
    """Optimizer steps done."""
    seconds: float = 0.0
    """Time spent in training steps."""
    tokens: int = 0
    """Document tokens trained on, over all ranks."""
    flops: float = 0.0
    """Model FLOPs over all ranks; NaN if unknown, because an older version began the run."""
    evaluated_steps: int = 0
    """Steps done at the last evaluation; 0 before the first."""
    recent: list[list[float]] = field(default_factory=list)
    """[loss, gradient norm] of the recent steps; empty without training.on_spike."""
    skipped_in_a_row: int = 0
    """Steps without an update since the last one with an update."""
    rollbacks: int = 0
    """How often the run has gone back to a checkpoint because of a spike."""


def save(session: Session, progress: Progress, damaged: Collection[Path] = ()) -> CheckpointInfo:
    """Save everything that a bitwise resume needs, and return when it is complete; see ``stage``.

    Collective over the world, whose default group must be of gloo.

    Raises:
        TrainingError: A weight or optimizer state is not finite; nothing is written.
        CheckpointError: The checkpoint could not be written; older ones are untouched.
    """
    return stage(session, progress, damaged)(background=None)


def stage(
    session: Session,
    progress: Progress,
    damaged: Collection[Path] = (),
    staging: Staging | None = None,
) -> Save:
    """Copy everything that a bitwise resume needs to host memory; the run may then go on.

    Needs 12 bytes of host memory per parameter of this rank, divided by the number of ranks that
    shard it under ZeRO, until the returned save has ended; and once more as much during the save.

    Collectives: one all-reduce of a number over the world.

    Args:
        session: The run.
        progress: Its progress.
        damaged: Checkpoints that failed verification; they do not count as kept.
        staging: Makes the copies and may keep its memory for the next; None: that of this call.

    Returns:
        The save, which writes the checkpoint when all ranks call it, once.

    Raises:
        TrainingError: A weight or optimizer state is not finite.
    """
    config = session.config
    state, broken = (staging or Staging()).copy(session)
    _check_finite(broken, progress.steps, session.groups.device)
    save = functools.partial(
        save_checkpoint,
        checkpoint_directory(config.run_directory),
        progress.steps,
        metadata={
            "progress": asdict(progress),
            "optimizer_steps": session.engine.optimizer_steps,
            "data": session.loader.state_dict(),
            "vocabulary": session.corpus.vocabulary_digest,
            "meaning_of_ids": session.corpus.vocabulary,
        },
        config_text=config.to_toml(),
        groups=session.groups,
        keep=Keep(config.checkpoint.keep, config.checkpoint.keep_every_steps, damaged),
    )

    def write(*, background: Background | None) -> CheckpointInfo:
        return save(_tensors(state, session.groups, background), background=background)

    return write


def _tensors(
    state: StagedState, groups: ProcessGroups, background: Background | None
) -> list[NamedTensor]:
    """Assemble the tensors that this rank writes."""
    return [
        tensor
        for name, parameter, values in state.assemble(background and background.group)
        for kind, flat in values.items()
        for tensor in _named_parts(
            f"{kind}/", name, parameter, flat.view(_stacked_shape(parameter, groups))
        )
    ]


def restore(session: Session, checkpoint: CheckpointInfo) -> Progress:
    """Restore the state of a checkpoint saved in any layout. Collective over the world.

    Temporarily needs host memory of 12 bytes per parameter of this rank, or 4 if it is frozen. The
    moments of a tower that was trained and is frozen now are not read.

    Raises:
        CheckpointError: The checkpoint belongs to another model or another corpus, has weights
            only, or was not written by a training run.
    """
    metadata = read_metadata(checkpoint)
    if metadata.get(CONTENTS) == WEIGHTS_ONLY:
        raise CheckpointError(
            f"{checkpoint.path} has weights only, no optimizer state and no data position to resume"
            " from; run.initialize_from starts a new run from weights"
        )
    try:
        saved = metadata["progress"]
        # Older checkpoints lack these keys: FLOPs were not counted, and each save came after the
        # evaluation that was due.
        older = {"flops": math.nan, "evaluated_steps": saved["steps"]}
        progress = Progress(**{**older, **saved})
        data, optimizer_steps = metadata["data"], metadata["optimizer_steps"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint.path}/metadata.json: not written by a training run: {error}"
        ) from error
    session.loader.load_state_dict(data)
    states: dict[str, torch.Tensor] = {}
    tensors: list[NamedTensor] = []
    unused: set[str] = set()
    for name, parameter in session.model.named_parameters():
        for kind in STATE_KINDS:
            if kind != STATE_KINDS[0] and not parameter.requires_grad:
                parts = parts_of(name, parameter)
                unused.update(f"{kind}/{part.name}" for part in parts)
                continue
            state = states[f"{kind}/{name}"] = _empty_part(parameter, session.groups)
            tensors += _named_parts(f"{kind}/", name, parameter, state)
    load_checkpoint(checkpoint, tensors, session.groups, unused=unused)
    session.engine.import_state(_LoadedState(states, session.groups.device), optimizer_steps)
    return progress


def restore_weights(session: Session, checkpoint: CheckpointInfo) -> None:
    """Set the weights from a checkpoint saved in any layout, of any floating-point dtype.

    Moments become zero, and no optimizer step counts as done. Collective over the world.

    Raises:
        CheckpointError: The checkpoint belongs to another model.
    """
    states = {
        WEIGHT_PREFIX + name: _empty_part(parameter, session.groups)
        for name, parameter in session.model.named_parameters()
    }
    tensors = [
        tensor
        for name, parameter in session.model.named_parameters()
        for tensor in _named_parts(WEIGHT_PREFIX, name, parameter, states[WEIGHT_PREFIX + name])
    ]
    load_checkpoint(checkpoint, tensors, session.groups, prefix=WEIGHT_PREFIX, any_float=True)
    session.engine.import_state(_LoadedState(states, session.groups.device), optimizer_steps=0)


def load_weights(
    model: nn.Module, checkpoint: CheckpointInfo, groups: ProcessGroups | None
) -> None:
    """Load weights into a model without an engine, from a checkpoint saved in any layout.

    Weights of any floating-point dtype are converted. Collective over the world; local without
    ``groups``.

    Raises:
        CheckpointError: The checkpoint belongs to another model.
    """
    weights = {
        name: torch.empty(parameter.shape, dtype=torch.float32)
        for name, parameter in model.named_parameters()
    }
    tensors = [
        tensor
        for name, parameter in model.named_parameters()
        for tensor in _named_parts(WEIGHT_PREFIX, name, parameter, weights[name])
    ]
    load_checkpoint(checkpoint, tensors, groups, prefix=WEIGHT_PREFIX, any_float=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])


def _named_parts(
    prefix: str, name: str, parameter: nn.Parameter, values: torch.Tensor
) -> list[NamedTensor]:
    """Return the parts of a parameter under their checkpoint names, as views of ``values``."""
    return [
        NamedTensor(prefix + part.name, values[part.rows], part.sharding)
        for part in parts_of(name, parameter)
    ]


class _LoadedState(Mapping[str, Mapping[str, torch.Tensor]]):
    """States on the host by parameter, moved to the device one parameter at a time.

    Moments that are absent are zero.
    """

    def __init__(self, parts: dict[str, torch.Tensor], device: torch.device) -> None:
        self._parts = parts
        self._device = device

    def __getitem__(self, name: str) -> dict[str, torch.Tensor]:
        weight = self._parts[WEIGHT_PREFIX + name].to(self._device)
        found = {kind: self._parts.get(f"{kind}/{name}") for kind in STATE_KINDS}
        return {
            kind: torch.zeros_like(weight) if part is None else part.to(self._device)
            for kind, part in found.items()
        }

    def __iter__(self) -> Iterator[str]:
        prefix = WEIGHT_PREFIX
        return (name.removeprefix(prefix) for name in self._parts if name.startswith(prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _check_finite(broken: list[str], step: int, device: torch.device) -> None:
    """Raise the same error on all ranks if any has broken parameters."""
    count = torch.tensor(len(broken), device=device)
    dist.all_reduce(count, op=dist.ReduceOp.MAX)
    if not count:
        return
    gathered = values_of_all_ranks(broken[:_BROKEN_NAMES])
    names = list(dict.fromkeys(name for of_rank in gathered for name in of_rank))
    more = f"{len(names) - 1} more" if count <= _BROKEN_NAMES else "more"
    others = f" (and {more})" if len(names) > 1 else ""
    raise TrainingError(
        f"step {step}: {names[0]} or its optimizer state is not finite{others}; the step was"
        " not saved, older checkpoints are untouched"
    )


def _empty_part(parameter: nn.Parameter, groups: ProcessGroups) -> torch.Tensor:
    """Return an uninitialized fp32 host tensor in the shape of this rank's part."""
    return torch.empty(_stacked_shape(parameter, groups), dtype=torch.float32)

    return torch.empty(_stacked_shape(parameter, groups), dtype=torch.float32)


def _stacked_shape(parameter: nn.Parameter, groups: ProcessGroups) -> tuple[int, ...]:
    """Return the shape of this rank's tensor-parallel shard of a parameter.

    It follows from the sharding, because ZeRO-3 empties the parameter itself.
    """
    stacked = len(experts_of(parameter) or (0,))
    return sharding_of(parameter).parameter_shape(groups.tensor_size, stacked)
