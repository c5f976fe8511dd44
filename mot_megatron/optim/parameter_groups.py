"""Which parameters decay: matrices do; norm weights, biases and other vectors do not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mot_megatron.optim.owners import Owned


def parameter_groups(owned: Iterable[Owned], weight_decay: float) -> list[dict[str, Any]]:
    """Group parameters by owners, and these into those that decay and those that do not.

    DeepSpeed gathers the weights group by group, so the groups' order is that of ``owned``.

    Returns:
        Groups for a torch optimizer, each with "params" and "weight_decay", and those that have
        owners of their own with "moe" and "name" for DeepSpeed; empty ones left out.
    """
    groups: list[dict[str, Any]] = []
    for owners in owned:
        marks = {} if owners.name is None else {"moe": True, "name": owners.name}
        matrices = [p for p in owners.parameters if p.ndim > 1]
        vectors = [p for p in owners.parameters if p.ndim <= 1]
        groups += [
            {"params": matrices, "weight_decay": weight_decay} | marks,
            {"params": vectors, "weight_decay": 0.0} | marks,
        ]
    return [group for group in groups if group["params"]]
