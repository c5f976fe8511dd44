"""How a rank's parameter lies inside the global one, and which tower owns it.

Every parameter carries a ``sharding`` attribute; initialization, checkpoints and conversion
read it and nothing else, so none of them has to know what kind of layer a parameter belongs to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

SHARED = -1
"""The tower of a parameter that belongs to none."""


@dataclass(frozen=True)
class ParameterSharding:
    """The global shape of a parameter and the dimension that tensor parallelism splits.

    The global shape may have more dimensions than the parameter: SwiGLU's first projection is
    [2, ffn, h] split along ffn, while a rank's parameter is the flat [2 * ffn / tp, h].
    """

    global_shape: tuple[int, ...]
    shard_dim: int | None = None

    def local_shape(self, tensor_parallel_size: int) -> tuple[int, ...]:
        """Shape of one rank's part, with as many dimensions as ``global_shape``."""
        if self.shard_dim is None:
            return self.global_shape
        shape = list(self.global_shape)
        shape[self.shard_dim] //= tensor_parallel_size
        return tuple(shape)


@dataclass(frozen=True)
class NamedPart:
    """What checkpoints and initialization know by one name: a parameter, or one expert's rows."""

    name: str
    """Global."""
    rows: slice
    """Rows of the parameter (elements of a vector)."""
    sharding: ParameterSharding


def set_sharding(parameter: torch.nn.Parameter | None, sharding: ParameterSharding) -> None:
    """Attach ``sharding`` to ``parameter``; megatron types its weights as possibly absent."""
    assert parameter is not None
    parameter.sharding = sharding  # type: ignore[attr-defined]


def sharding_of(parameter: torch.nn.Parameter) -> ParameterSharding:
    """The sharding attached by ``set_sharding``."""
    return parameter.sharding  # type: ignore[attr-defined]


def mark_tower(module: torch.nn.Module, tower: int) -> None:
    """Attach the tower's index, or SHARED, to every parameter of ``module``."""
    for parameter in module.parameters():
        parameter.tower = tower  # type: ignore[attr-defined]


def tower_of(parameter: torch.nn.Parameter) -> int:
    """The tower attached by ``mark_tower``."""
    return parameter.tower  # type: ignore[attr-defined]


def mark_replica(module: torch.nn.Module) -> None:
    """Say that this rank's parameters of ``module`` are copies of another pipeline stage's.

    The other stage's count in norms and are saved; the copies follow them because both get the
    sum of both stages' gradients.
    """
    for parameter in module.parameters():
        parameter.replica = True  # type: ignore[attr-defined]


def is_replica(parameter: torch.nn.Parameter) -> bool:
    """Whether ``mark_replica`` was called for the parameter."""
    return getattr(parameter, "replica", False)


def mark_experts(parameter: torch.nn.Parameter, experts: range) -> None:
    """Say that the parameter stacks the rows of these experts, by their global indices.

    Its layout is that of a single expert. The tower's experts are spread over the ranks of
    ``ExpertGroups.expert``; those of ``ExpertGroups.data`` hold the same ones.
    """
    parameter.experts = experts  # type: ignore[attr-defined]


def experts_of(parameter: torch.nn.Parameter) -> range | None:
    """The experts attached by ``mark_experts``; None for what is no expert's."""
    return getattr(parameter, "experts", None)


def parts_of(name: str, parameter: torch.nn.Parameter) -> list[NamedPart]:
    """The parameter by its global name, or expert by expert: ``experts.<i>`` for ``experts``.

    No name depends on where an expert lies, so that any layout can read what another wrote.
    """
    layout, experts = sharding_of(parameter), experts_of(parameter)
    if experts is None:
        return [NamedPart(name, slice(None), layout)]
    # ZeRO-3 leaves a parameter without its shape.
    num_rows = getattr(parameter, "ds_shape", parameter.shape)[0] // len(experts)
    return [
        NamedPart(name_of_expert(name, expert), slice(at * num_rows, (at + 1) * num_rows), layout)
        for at, expert in enumerate(experts)
    ]


def name_of_expert(name: str, expert: int) -> str:
    """What checkpoints call one expert's part of the parameter ``name``, which stacks several."""
    stem, _, kind = name.rpartition(".")
    return f"{stem}.{expert}.{kind}"


def mark_auxiliary(module: torch.nn.Module) -> None:
    """Say that ``module`` learns beside the model, whose training it must not change."""
    for parameter in module.parameters():
        parameter.auxiliary = True  # type: ignore[attr-defined]


def is_auxiliary(parameter: torch.nn.Parameter) -> bool:
    """Whether ``mark_auxiliary`` was called for the parameter."""
    return getattr(parameter, "auxiliary", False)
