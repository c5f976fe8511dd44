"""Save and restore the state of a run: weights, optimizer state, position in the data, progress.

Tensors are named ``weight/<parameter>``, ``exp_avg/<parameter>`` and ``exp_avg_sq/<parameter>``, so
the prefix ``weight/`` selects the weights alone.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from mot_megatron.checkpoint.background import HostStaging, Save
from mot_megatron.checkpoint.find import CheckpointInfo, read_metadata
from mot_megatron.checkpoint.load import load_checkpoint
from mot_megatron.checkpoint.save import Keep, save_checkpoint
from mot_megatron.checkpoint.tensors import NamedTensor
from mot_megatron.errors import CheckpointError, TrainingError
from mot_megatron.model.sharding import experts_of, is_replica, parts_of, sharding_of, tower_of
from mot_megatron.parallel.groups import ProcessGroups
from mot_megatron.train.session import Session

WEIGHT_PREFIX = "weight/"
STATE_KINDS = ("weight", "exp_avg", "exp_avg_sq")
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


def checkpoint_directory(run_directory: Path) -> Path:
    """Return the folder of a run's checkpoints."""
    return run_directory / "checkpoints"


def save(session: Session, progress: Progress, damaged: Collection[Path] = ()) -> CheckpointInfo:
    """Save everything that a bitwise resume needs; see ``stage``. Collective over the world.

    Raises:
        TrainingError: A weight or optimizer state is not finite; nothing is written.
        CheckpointError: The checkpoint could not be written; older ones are untouched.
    """
    return stage(session, progress, damaged)(background=None)


def stage(
    session: Session,
    progress: Progress,
    damaged: Collection[Path] = (),
    staging: HostStaging | None = None,
) -> Save:
    """Copy everything that a bitwise resume needs to host memory. Collective over the world.

    Needs host memory of 12 bytes per parameter of this rank, divided by the number of ranks that
    hold the same parameter, until the returned save is dropped, and device memory for the state of
    one parameter.

    Args:
        session: The run.
        progress: Its progress.
        damaged: Checkpoints that failed verification; they do not count as kept.
        staging: Makes the copies, for saves in the background; None: copies of this call only.

    Returns:
        The save, which writes the checkpoint when it is called, on all ranks. The run may go on
        meanwhile.

    Raises:
        TrainingError: A weight or optimizer state is not finite.
    """
    config = session.config
    return functools.partial(
        save_checkpoint,
        checkpoint_directory(config.run_directory),
        progress.steps,
        _tensors_to_write(session, progress.steps, staging),
        metadata={
            "progress": asdict(progress),
            "optimizer_steps": session.engine.optimizer_steps,
            "data": session.loader.state_dict(),
            "vocabulary": session.corpus.vocabulary_digest,
        },
        config_text=config.to_toml(),
        groups=session.groups,
        keep=Keep(config.checkpoint.keep, config.checkpoint.keep_every_steps, damaged),
    )


def restore(session: Session, checkpoint: CheckpointInfo) -> Progress:
    """Restore the state of a checkpoint saved in any layout. Collective over the world.

    Temporarily needs host memory of 12 bytes per parameter of this rank.

    Raises:
        CheckpointError: The checkpoint belongs to another model or another corpus, or was not
            written by a training run.
    """
    metadata = read_metadata(checkpoint)
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

    Collective over the world; local without ``groups``.

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
    load_checkpoint(checkpoint, tensors, groups, prefix=WEIGHT_PREFIX)
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


def _tensors_to_write(
    session: Session, step: int, staging: HostStaging | None
) -> list[NamedTensor]:
    """Return the tensors that this rank writes, on the host.

    Parameters are assigned round-robin to the ranks that hold them.

    Collectives: those of ``export_state``, and one all-reduce of a number over the world.

    Raises:
        TrainingError: A tensor is not finite; raised on all ranks.
    """
    groups = session.groups
    parameters = dict(session.model.named_parameters())
    tensors: list[NamedTensor] = []
    finite: dict[str, torch.Tensor] = {}
    # Counted per reduction group, so that all ranks of a group have the same count.
    seen: Counter[tuple[int, bool]] = Counter()
    for name, state in session.engine.export_state():
        parameter = parameters[name]
        finite[name] = torch.stack([state[kind].isfinite().all() for kind in STATE_KINDS]).all()
        owner = tower_of(parameter), experts_of(parameter) is not None
        holders = groups.reduction_group(*owner)
        writes = seen[owner] % holders.size() == holders.rank()
        seen[owner] += 1
        if writes and not is_replica(parameter):
            for kind in STATE_KINDS:
                values = state[kind]
                host = values.cpu() if staging is None else staging.put(f"{kind}/{name}", values)
                tensors += _named_parts(f"{kind}/", name, parameter, host)
    if staging is not None:
        staging.finish()
    _check_finite(finite, step, groups.device)
    return tensors


def _check_finite(finite: dict[str, torch.Tensor], step: int, device: torch.device) -> None:
    """Check a flag on the device for every parameter, all of them with one read."""
    broken = [
        name
        for name, is_finite in zip(finite, torch.stack([*finite.values()]).tolist(), strict=True)
        if not is_finite
    ]
    count = torch.tensor(len(broken), device=device)
    dist.all_reduce(count, op=dist.ReduceOp.MAX)
    if not count:
        return
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, broken[:_BROKEN_NAMES])
    names = list(dict.fromkeys(name for of_rank in gathered for name in of_rank))
    more = f"{len(names) - 1} more" if count <= _BROKEN_NAMES else "more"
    others = f" (and {more})" if len(names) > 1 else ""
    raise TrainingError(
        f"step {step}: {names[0]} or its optimizer state is not finite{others}; the step was"
        " not saved, older checkpoints are untouched"
    )


def _empty_part(parameter: nn.Parameter, groups: ProcessGroups) -> torch.Tensor:
    """Return an uninitialized fp32 host tensor in the shape of this rank's tensor-parallel shard.

    The shape follows from the sharding, because ZeRO-3 empties the parameter itself. Parameters are
    matrices or vectors: leading dimensions of the global shape, and experts, are stacked as rows.
    """
    *rows, width = sharding_of(parameter).local_shape(groups.tensor_size)
    stacked = len(experts_of(parameter) or (0,))
    shape = (stacked * math.prod(rows), width) if rows else (width,)
    return torch.empty(shape, dtype=torch.float32)
