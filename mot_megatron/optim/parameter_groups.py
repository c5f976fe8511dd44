"""Parameter groups: weight decay for matrices, none for norm weights, biases and other vectors.

Towers may have a learning rate of their own, and then have groups of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

from torch import nn

from mot_megatron.model.sharding import SHARED, tower_of
from mot_megatron.optim.owners import Owned
from mot_megatron.parallel.buckets import buckets


def parameter_groups(
    owned: Iterable[Owned],
    weight_decay: float,
    largest: int | None = None,
    lr_mults: Sequence[float] = (),
) -> list[dict[str, Any]]:
    """Group parameters by owners, by whether they have weight decay, and by learning rate.

    The groups are in the order of ``owned``, because DeepSpeed gathers the weights group by group.

    Args:
        owned: This rank's parameters by owners.
        weight_decay: Of matrices.
        largest: Maximum number of elements in a group of several parameters; None: no maximum.
        lr_mults: Factor on the learning rate of each tower's own weights; empty: 1 for all.

    Returns:
        Non-empty parameter groups for a torch optimizer, each with "params", "weight_decay" and
        "lr_mult", the factor on the learning rate. Groups with a named process group also have
        "moe" and "name" for DeepSpeed.
    """
    groups: list[dict[str, Any]] = []
    for owners in owned:
        marks = {} if owners.name is None else {"moe": True, "name": owners.name}
        matrices = [p for p in owners.parameters if p.ndim > 1]
        vectors = [p for p in owners.parameters if p.ndim <= 1]
        for parameters, decay in ((matrices, weight_decay), (vectors, 0.0)):
            for factor, alike in _by_factor(parameters, lr_mults).items():
                shared = {"weight_decay": decay, "lr_mult": factor} | marks
                following = iter(alike)
                groups += [
                    {"params": list(islice(following, count))} | shared
                    for count in buckets((p.numel() for p in alike), largest)
                ]
    return groups


def _by_factor(
    parameters: Iterable[nn.Parameter], lr_mults: Sequence[float]
) -> dict[float, list[nn.Parameter]]:
    """Group by learning rate; all owners have the same parameters, and so the same order."""
    found: dict[float, list[nn.Parameter]] = {}
    for parameter in parameters:
        tower = tower_of(parameter) if lr_mults else SHARED
        found.setdefault(1.0 if tower == SHARED else lr_mults[tower], []).append(parameter)
    return found
