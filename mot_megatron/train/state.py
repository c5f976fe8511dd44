"""What a run must remember: weights, optimizer state, position in the data, progress.

Tensors are named ``weight/<parameter>``, ``exp_avg/<parameter>`` and ``exp_avg_sq/<parameter>``,
so that whoever wants the weights alone asks for the prefix ``weight/``.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from mot_megatron.checkpoint.find import CheckpointInfo, read_metadata
from mot_megatron.checkpoint.load import load_checkpoint
from mot_megatron.checkpoint.save import save_checkpoint
from mot_megatron.checkpoint.tensors import NamedTensor
from mot_megatron.errors import CheckpointError, TrainingError
from mot_megatron.model.sharding import layout_of
from mot_megatron.parallel.groups import ProcessGroups
from mot_megatron.train.session import Session

WEIGHT_PREFIX = "weight/"
_STATE_KINDS = ("weight", "exp_avg", "exp_avg_sq")


@dataclass
class Progress:
    """How far a run has come, over all its resumptions."""

    steps: int = 0
    """Optimizer steps done."""
    seconds: float = 0.0
    """Time spent in training steps."""
    tokens: int = 0
    """Document tokens trained on, over all ranks."""


def checkpoint_directory(run_directory: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_directory / "checkpoints"


def save(session: Session, progress: Progress) -> CheckpointInfo:
    """Save everything that resuming bitwise needs. Collective over the world.

    Each rank holds its tensor-parallel part of all weights and optimizer states in fp32 meanwhile.

    Raises:
        TrainingError: a weight is not finite, so that this would be no good checkpoint.
        CheckpointError: it could not be written; older checkpoints are untouched.
    """
    parameters = dict(session.model.named_parameters())
    tensors = [
        NamedTensor(f"{kind}/{name}", state[kind], layout_of(parameters[name]))
        for name, state in session.engine.export_state()
        for kind in _STATE_KINDS
    ]
    _check_finite(tensors, progress.steps, session.groups)
    return save_checkpoint(
        checkpoint_directory(session.config.run_directory),
        progress.steps,
        tensors,
        metadata={
            "progress": asdict(progress),
            "optimizer_steps": session.engine.optimizer_steps,
            "data": session.loader.state_dict(),
        },
        config_text=session.config.to_toml(),
        groups=session.groups,
        keep=session.config.checkpoint.keep,
    )


def restore(session: Session, checkpoint: CheckpointInfo) -> Progress:
    """Continue where ``checkpoint`` was saved, under any layout. Collective over the world.

    Raises:
        CheckpointError: it is another model's, or its data position another corpus's.
    """
    metadata = read_metadata(checkpoint)
    try:
        progress = Progress(**metadata["progress"])
        data, optimizer_steps = metadata["data"], metadata["optimizer_steps"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint.path}/metadata.json: not written by a training run: {error}"
        ) from error
    session.loader.load_state_dict(data)
    state = {
        name: {kind: _empty_part(parameter, session.groups) for kind in _STATE_KINDS}
        for name, parameter in session.model.named_parameters()
    }
    tensors = [
        NamedTensor(f"{kind}/{name}", state[name][kind], layout_of(parameter))
        for name, parameter in session.model.named_parameters()
        for kind in _STATE_KINDS
    ]
    load_checkpoint(checkpoint, tensors, session.groups)
    session.engine.import_state(state, optimizer_steps)
    return progress


def load_weights(
    model: nn.Module, checkpoint: CheckpointInfo, groups: ProcessGroups | None
) -> None:
    """Fill a model that no engine has taken over, from any checkpoint of it.

    Collective over the world if there is one.

    Raises:
        CheckpointError: it is another model's.
    """
    parts = {
        name: torch.empty(parameter.shape, dtype=torch.float32)
        for name, parameter in model.named_parameters()
    }
    tensors = [
        NamedTensor(WEIGHT_PREFIX + name, parts[name], layout_of(parameter))
        for name, parameter in model.named_parameters()
    ]
    load_checkpoint(checkpoint, tensors, groups, prefix=WEIGHT_PREFIX)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(parts[name])


def _check_finite(tensors: list[NamedTensor], step: int, groups: ProcessGroups) -> None:
    """Refuse to save a step that overflowed; one all-reduce, so that all ranks refuse."""
    finite = torch.stack([torch.isfinite(named.tensor).all() for named in tensors])
    broken = (~finite).to(groups.device, torch.int32)
    dist.all_reduce(broken, op=dist.ReduceOp.MAX)
    names = [named.name for named, bad in zip(tensors, broken.tolist(), strict=True) if bad]
    if names:
        raise TrainingError(
            f"step {step}: {names[0]} is not finite, nor are {len(names) - 1} other tensors; the"
            " step is not saved, older checkpoints are untouched"
        )


def _empty_part(parameter: nn.Parameter, groups: ProcessGroups) -> torch.Tensor:
    """Room for this rank's whole part, in the parameter's own shape.

    ZeRO-3 leaves the parameter itself without one. Parameters are matrices or vectors: leading
    dimensions of the layout are stacked rows.
    """
    *rows, width = layout_of(parameter).local_shape(groups.tensor_size)
    shape = (math.prod(rows), width) if rows else (width,)
    return torch.empty(shape, dtype=torch.float32, device=groups.device)
