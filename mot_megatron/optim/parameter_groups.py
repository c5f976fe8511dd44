"""Parameter groups: weight decay for matrices, none for norm weights and other vectors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mot_megatron.optim.owners import Owned


def parameter_groups(owned: Iterable[Owned], weight_decay: float) -> list[dict[str, Any]]:
    """Group parameters by owners and by whether they have weight decay.

    The groups are in the order of ``owned``, because DeepSpeed gathers the weights group by group.

    Returns:
        Non-empty parameter groups for a torch optimizer, each with "params" and "weight_decay".
        Groups with a named process group also have "moe" and "name" for DeepSpeed.
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
