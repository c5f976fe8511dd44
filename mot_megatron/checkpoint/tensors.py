"""What is saved: tensors under global names, each with its place in the global tensor.

A file never says which layout wrote it, only where in the global tensor its pieces lie, so any
layout can read it.
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
    """This rank's part of one global tensor.

    ``tensor`` may have the parameter's own shape: it is viewed as ``sharding.local_shape(...)``. It
    must be contiguous, hold the same values wherever its tower and stage lie, and without a
    ``shard_dim`` on all tensor-parallel ranks.
    """

    name: str
    tensor: torch.Tensor
    sharding: ParameterSharding


def describe(
    tensors: Sequence[NamedTensor], groups: ProcessGroups | None
) -> dict[str, torch.Tensor]:
    """The tensors as torch.distributed.checkpoint wants them, sharing their memory.

    A sharded tensor becomes a DTensor over the tensor-parallel group; one that every rank holds
    whole stays plain, and is written by one of its holders. No collectives.

    Args:
        tensors: This rank's tensors, in any order, names unique.
        groups: The process groups; None for a single process, which holds everything whole.
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
