"""How a rank's shard of a parameter fits into the global parameter, and which tower owns it.

Every parameter carries a ``sharding`` attribute. Initialization and checkpoints read nothing else,
so they do not depend on the kind of layer a parameter belongs to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

SHARED = -1
"""The tower index of a parameter that all towers share."""


@dataclass(frozen=True)
class ParameterSharding:
    """The global shape of a parameter and the dimension that tensor parallelism splits.

    The global shape may have more dimensions than the parameter: SwiGLU's first projection is
    [2, ffn, h] split along ffn, while a rank's parameter is the flat [2 * ffn / tp, h].
    """

    global_shape: tuple[int, ...]
    shard_dim: int | None = None

    def local_shape(self, tensor_parallel_size: int) -> tuple[int, ...]:
        """Return the shape of one rank's shard, with as many dimensions as ``global_shape``."""
        if self.shard_dim is None:
            return self.global_shape
        shape = list(self.global_shape)
        shape[self.shard_dim] //= tensor_parallel_size
        return tuple(shape)

    def parameter_shape(self, tensor_parallel_size: int, stacked: int = 1) -> tuple[int, ...]:
        """Return the shape of one rank's parameter, a matrix or a vector.

        Leading dimensions of the global shape, and ``stacked`` experts, are stacked as rows.
        """
        *rows, width = self.local_shape(tensor_parallel_size)
        return (stacked * math.prod(rows), width) if rows else (width,)


@dataclass(frozen=True)
class NamedPart:
    """A parameter, or one expert's rows of it, under the name that checkpoints use."""

    name: str
    """Global name."""
    rows: slice
    """Rows of the parameter (elements of a vector)."""
    sharding: ParameterSharding


def set_sharding(parameter: torch.nn.Parameter | None, sharding: ParameterSharding) -> None:
    """Attach ``sharding`` to ``parameter``, which megatron's types allow to be None."""
    assert parameter is not None
    parameter.sharding = sharding  # type: ignore[attr-defined]


def sharding_of(parameter: torch.nn.Parameter) -> ParameterSharding:
    """Return the sharding attached by ``set_sharding``."""
    return parameter.sharding  # type: ignore[attr-defined]


def mark_tower(module: torch.nn.Module, tower: int) -> None:
    """Attach the tower's index, or SHARED, to every parameter of ``module``."""
    for parameter in module.parameters():
        parameter.tower = tower  # type: ignore[attr-defined]


def tower_of(parameter: torch.nn.Parameter) -> int:
    """Return the tower attached by ``mark_tower``."""
    return parameter.tower  # type: ignore[attr-defined]


def mark_replica(module: torch.nn.Module) -> None:
    """Mark this rank's parameters of ``module`` as copies of another pipeline stage's.

    Only the originals count in norms and are saved. The copies stay equal to them because both
    receive the sum of both stages' gradients.
    """
    for parameter in module.parameters():
        parameter.replica = True  # type: ignore[attr-defined]


def is_replica(parameter: torch.nn.Parameter) -> bool:
    """Return whether ``mark_replica`` was called for the parameter."""
    return getattr(parameter, "replica", False)


def mark_experts(parameter: torch.nn.Parameter, experts: range) -> None:
    """Mark the parameter as the stacked rows of these experts, given by global index.

    Its sharding describes a single expert. A tower's experts are spread over the ranks of
    ``ExpertGroups.expert``; the ranks of ``ExpertGroups.data`` hold the same experts.
    """
    parameter.experts = experts  # type: ignore[attr-defined]


def experts_of(parameter: torch.nn.Parameter) -> range | None:
    """Return the experts attached by ``mark_experts``, or None for any other parameter."""
    return getattr(parameter, "experts", None)


def parts_of(name: str, parameter: torch.nn.Parameter) -> list[NamedPart]:
    """List the parameter under its global name, or one part per expert (``experts.<i>...``).

    No name depends on the rank that holds an expert, so any layout can read what another wrote.
    """
    layout, experts = sharding_of(parameter), experts_of(parameter)
    if experts is None:
        return [NamedPart(name, slice(None), layout)]
    # ZeRO-3 empties a parameter's shape and stores the full one in ds_shape.
    num_rows = getattr(parameter, "ds_shape", parameter.shape)[0] // len(experts)
    return [
        NamedPart(name_of_expert(name, expert), slice(at * num_rows, (at + 1) * num_rows), layout)
        for at, expert in enumerate(experts)
    ]


def name_of_expert(name: str, expert: int) -> str:
    """Return the checkpoint name of one expert's part of the stacked parameter ``name``."""
    stem, _, kind = name.rpartition(".")
    return f"{stem}.{expert}.{kind}"


def freeze_towers(module: torch.nn.Module, frozen: Sequence[bool]) -> None:
    """Exclude from training the parameters of ``module`` that belong to a frozen tower alone.

    Args:
        module: Its parameters have been marked with ``mark_tower``.
        frozen: Whether each of the K towers is frozen.
    """
    for parameter in module.parameters():
        tower = tower_of(parameter)
        if tower != SHARED and frozen[tower]:
            parameter.requires_grad_(False)


def mark_auxiliary(module: torch.nn.Module) -> None:
    """Mark ``module`` as trained beside the model, without influence on the model's training."""
    for parameter in module.parameters():
        parameter.auxiliary = True  # type: ignore[attr-defined]


def is_auxiliary(parameter: torch.nn.Parameter) -> bool:
    """Return whether ``mark_auxiliary`` was called for the parameter."""
    return getattr(parameter, "auxiliary", False)
