"""Which parameters decay: matrices do; norm weights, biases and other vectors do not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def parameter_groups(
    parameters: Iterable[nn.Parameter], weight_decay: float
) -> list[dict[str, Any]]:
    """Group the trainable parameters into those that decay and those that do not.

    The order inside a group is the model's, so it is the same on every rank. DeepSpeed hangs in
    its norm when ranks hold unequal numbers of groups: all ranks must hold at least one parameter
    of the same kinds, which is so while every rank holds a shard of every layer.

    Returns:
        Groups for a torch optimizer, each with "params" and "weight_decay"; empty ones left out.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
