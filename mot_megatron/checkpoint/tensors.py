"""What a checkpoint stores: tensors under global names, each with its position in a global tensor.

The files do not record the layout that wrote them, only the position of each piece in its global
tensor. Therefore any layout can read them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from mot_megatron.model.sharding import ParameterSharding

if TYPE_CHECKING:
    from mot_megatron.parallel.groups import ProcessGroups


@dataclass(frozen=True)
class NamedTensor:
    """This rank's part of one global tensor."""

    name: str
    """Global name."""
    tensor: torch.Tensor
    """Contiguous values, which may have the parameter's own shape; they are viewed as
    ``sharding.local_shape(...)``. They must be equal on all ranks that hold the tower and stage
    and, if ``sharding`` has no ``shard_dim``, on all tensor-parallel ranks."""
    sharding: ParameterSharding
    """Global shape and the dimension that tensor parallelism splits."""


def describe(
    tensors: Sequence[NamedTensor], groups: ProcessGroups | None
) -> dict[str, torch.Tensor]:
    """Convert tensors to the form that torch.distributed.checkpoint expects, sharing their memory.

    A sharded tensor becomes a DTensor over the tensor-parallel group. A tensor that every rank
    holds whole remains a plain tensor, and only one of those ranks writes it. No collectives.

    Args:
        tensors: This rank's tensors, in any order, with unique names.
        groups: The process groups; None for a single process, which holds every tensor whole.
    """
    size = 1 if groups is None else groups.tensor_size
    meshes: dict[str, DeviceMesh] = {}
    described: dict[str, torch.Tensor] = {}
    for named in tensors:
        if named.name in described:
            raise ValueError(f"two tensors are named {named.name}")
        local = named.tensor.detach().view(named.sharding.local_shape(size))
        if groups is None or size == 1 or named.sharding.shard_dim is None:
            described[named.name] = local
            continue
        device = local.device.type
        if device not in meshes:
            meshes[device] = DeviceMesh.from_group(groups.tensor, device)
        described[named.name] = _sharded(local, named.sharding, meshes[device])
    return described


def _sharded(local: torch.Tensor, sharding: ParameterSharding, mesh: DeviceMesh) -> DTensor:
    assert sharding.shard_dim is not None
    shape = torch.Size(sharding.global_shape)
    stride = torch.empty(shape, device="meta").stride()
    placement = Shard(sharding.shard_dim)
    return DTensor.from_local(local, mesh, [placement], run_check=False, shape=shape, stride=stride)
