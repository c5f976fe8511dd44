"""Save and restore the state of a run: weights, optimizer state, position in the data, progress.

The names of tensors are in ``checkpoint.names``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from mot_megatron.checkpoint.find import CheckpointInfo, read_metadata
from mot_megatron.checkpoint.load import load_checkpoint
from mot_megatron.checkpoint.names import (
    CONTENTS,
    STATE_KINDS,
    WEIGHT_PREFIX,
    WEIGHTS_ONLY,
    checkpoint_directory,
)
from mot_megatron.checkpoint.save import save_checkpoint
from mot_megatron.checkpoint.tensors import NamedTensor
from mot_megatron.errors import CheckpointError, TrainingError
from mot_megatron.model.sharding import experts_of, is_replica, parts_of, sharding_of, tower_of
from mot_megatron.parallel.groups import ProcessGroups
from mot_megatron.train.session import Session


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


def save(session: Session, progress: Progress, damaged: Collection[Path] = ()) -> CheckpointInfo:
    """Save everything that a bitwise resume needs. Collective over the world.

    Temporarily needs host memory of 12 bytes per parameter of this rank, divided by the number of
    ranks that hold the same parameter, and device memory for the state of one parameter.

    Args:
        session: The run.
        progress: Its progress.
        damaged: Checkpoints that failed verification; they do not count as kept.

    Raises:
        TrainingError: A weight or optimizer state is not finite; nothing is written.
        CheckpointError: The checkpoint could not be written; older ones are untouched.
    """
    tensors = _tensors_to_write(session, progress.steps)
    return save_checkpoint(
        checkpoint_directory(session.config.run_directory),
        progress.steps,
        tensors,
        metadata={
            "progress": asdict(progress),
            "optimizer_steps": session.engine.optimizer_steps,
            "data": session.loader.state_dict(),
            "vocabulary": session.corpus.vocabulary_digest,
        },
        config_text=session.config.to_toml(),
        groups=session.groups,
        keep=session.config.checkpoint.keep,
        damaged=damaged,
    )


def restore(session: Session, checkpoint: CheckpointInfo) -> Progress:
    """Restore the state of a checkpoint saved in any layout. Collective over the world.

    Temporarily needs host memory of 12 bytes per parameter of this rank.

    Raises:
        CheckpointError: The checkpoint belongs to another model or another corpus, has weights
            only, or was not written by a training run.
    """
    metadata = read_metadata(checkpoint)
    if metadata.get(CONTENTS) == WEIGHTS_ONLY:
        raise CheckpointError(
            f"{checkpoint.path} has weights only, no optimizer state and no data position to resume"
            " from; `mot upcycle` starts a new run from weights"
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
    for name, parameter in session.model.named_parameters():
        for kind in STATE_KINDS:
            state = states[f"{kind}/{name}"] = _empty_part(parameter, session.groups)
            tensors += _named_parts(f"{kind}/", name, parameter, state)
    load_checkpoint(checkpoint, tensors, session.groups)
    session.engine.import_state(_LoadedState(states, session.groups.device), optimizer_steps)
    return progress


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
    """States on the host by parameter, moved to the device one parameter at a time."""

    def __init__(self, parts: dict[str, torch.Tensor], device: torch.device) -> None:
        self._parts = parts
        self._device = device

    def __getitem__(self, name: str) -> dict[str, torch.Tensor]:
        return {kind: self._parts[f"{kind}/{name}"].to(self._device) for kind in STATE_KINDS}

    def __iter__(self) -> Iterator[str]:
        prefix = WEIGHT_PREFIX
        return (name.removeprefix(prefix) for name in self._parts if name.startswith(prefix))

    def __len__(self) -> int:
        return len(self._parts) // len(STATE_KINDS)


def _tensors_to_write(session: Session, step: int) -> list[NamedTensor]:
    """Return the tensors that this rank writes, on the host.

    Parameters are assigned round-robin to the ranks that hold them.

    Collectives: those of ``export_state``, and one all-gather of names over the world.

    Raises:
        TrainingError: A tensor is not finite; raised on all ranks.
    """
    written = written_parameters(session.model, session.groups)
    tensors: list[NamedTensor] = []
    broken: list[str] = []
    for name, state in session.engine.export_state():
        if not all(torch.isfinite(state[kind]).all() for kind in STATE_KINDS):
            broken.append(name)
        if name in written:
            for kind in STATE_KINDS:
                tensors += _named_parts(f"{kind}/", name, written[name], state[kind].cpu())
    _check_finite(broken, step)
    return tensors


def written_parameters(model: nn.Module, groups: ProcessGroups) -> dict[str, nn.Parameter]:
    """Return the parameters that this rank writes, in the model's order; no collectives.

    ``conversion.layout`` says the same for every rank without building a model.
    """
    written = {}
    # Counted per reduction group, so that all ranks of a group have the same count.
    seen: Counter[tuple[int, bool]] = Counter()
    for name, parameter in model.named_parameters():
        owner = tower_of(parameter), experts_of(parameter) is not None
        holders = groups.reduction_group(*owner)
        if seen[owner] % holders.size() == holders.rank() and not is_replica(parameter):
            written[name] = parameter
        seen[owner] += 1
    return written


def _check_finite(broken: list[str], step: int) -> None:
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, broken)
    names = list(dict.fromkeys(name for of_rank in gathered for name in of_rank))
    if names:
        others = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        raise TrainingError(
            f"step {step}: {names[0]} or its optimizer state is not finite{others}; the step was"
            " not saved, older checkpoints are untouched"
        )


def _empty_part(parameter: nn.Parameter, groups: ProcessGroups) -> torch.Tensor:
    """Return an uninitialized fp32 host tensor in the shape of this rank's tensor-parallel shard.

    The shape follows from the sharding, because ZeRO-3 empties the parameter itself.
    """
    stacked = len(experts_of(parameter) or (0,))
    shape = sharding_of(parameter).parameter_shape(groups.tensor_size, stacked)
    return torch.empty(shape, dtype=torch.float32)
