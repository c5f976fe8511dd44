"""Parameter groups: weight decay for matrices, none for norm weights, biases and other vectors."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

from mot_megatron.optim.owners import Owned
from mot_megatron.parallel.buckets import buckets


def parameter_groups(
    owned: Iterable[Owned], weight_decay: float, largest: int | None = None
) -> list[dict[str, Any]]:
    """Group parameters by owners and by whether they have weight decay.

    The groups are in the order of ``owned``, because DeepSpeed gathers the weights group by group.

    Args:
        owned: This rank's parameters by owners.
        weight_decay: Of matrices.
        largest: Maximum number of elements in a group of several parameters; None: no maximum.

    Returns:
        Non-empty parameter groups for a torch optimizer, each with "params" and "weight_decay".
        Groups with a named process group also have "moe" and "name" for DeepSpeed.
    """
    groups: list[dict[str, Any]] = []
    for owners in owned:
        marks = {} if owners.name is None else {"moe": True, "name": owners.name}
        matrices = [p for p in owners.parameters if p.ndim > 1]
        vectors = [p for p in owners.parameters if p.ndim <= 1]
        for parameters, decay in ((matrices, weight_decay), (vectors, 0.0)):
            following = iter(parameters)
            groups += [
                {"params": list(islice(following, count)), "weight_decay": decay} | marks
                for count in buckets((p.numel() for p in parameters), largest)
            ]
    return groups
