"""Access to the weights of frozen towers, with one interface for all ZeRO stages.

DeepSpeed's optimizers do not know these weights: they have no gradient, no fp32 copy and no AdamW
state. Every owner holds them whole in the precision of forward; with ZeRO-3, an owner holds a piece
and gathers the rest for forward and backward.
"""

from __future__ import annotations

import deepspeed
import torch
from torch import nn

from mot_megatron.optim.partitions import WEIGHT, Piece, piece_of_owner


def read(parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    """Return a copy of the full weight in fp32; with ZeRO-3, collective over the owners."""
    with deepspeed.zero.GatheredParameters([parameter], enabled=_is_scattered(parameter)):
        return {WEIGHT: parameter.detach().to(torch.float32, copy=True)}


def piece(parameter: nn.Parameter, data_rank: int) -> Piece:
    """Return what this rank stores, in the precision of forward; no collective."""
    if not _is_scattered(parameter):
        return Piece(0, {WEIGHT: parameter.detach().view(-1)}, is_full=True)
    stored: torch.Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
    return piece_of_owner(parameter, {WEIGHT: stored.detach()}, data_rank)


@torch.no_grad()
def write(parameter: nn.Parameter, weight: torch.Tensor, data_rank: int) -> None:
    """Set the weight from the full fp32 one, which is equal on all owners; no collective.

    With ZeRO-3, vectors that are gathered now change when they are gathered anew.
    """
    if not _is_scattered(parameter):
        parameter.copy_(weight.view_as(parameter))
        return
    start, values, _ = piece(parameter, data_rank)
    own = values[WEIGHT]
    own.copy_(weight.flatten()[start : start + own.numel()])


def held(parameter: nn.Parameter) -> list[torch.Tensor]:
    """Return the tensors in which this rank stores the weight now."""
    stored = [parameter.ds_tensor] if _is_scattered(parameter) else []  # type: ignore[attr-defined]
    return [parameter.data, *stored]


def _is_scattered(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_tensor")
