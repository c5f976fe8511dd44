"""Process groups of this rank, made once and handed down; nothing looks them up globally.

They are built by megatron's ``parallel_state`` because a few megatron functions (its
vocabulary-parallel loss) read that global state and take no group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch._C._distributed_c10d import HashStore

from mot_megatron.parallel.cpu import adapt_megatron_to_cpu
from mot_megatron.parallel.mesh import Mesh


@dataclass(frozen=True)
class ProcessGroups:
    """The groups this rank belongs to, and where it works."""

    tensor: dist.ProcessGroup
    data: dist.ProcessGroup
    mesh: Mesh
    rank: int
    device: torch.device

    @property
    def tensor_rank(self) -> int:
        """This rank's position in its tensor-parallel group."""
        return self.mesh.tensor_rank(self.rank)

    @property
    def tensor_size(self) -> int:
        """Ranks in the tensor-parallel group."""
        return self.mesh.tensor

    @property
    def data_rank(self) -> int:
        """This rank's position in its data-parallel group."""
        return self.mesh.data_rank(self.rank)

    @property
    def data_size(self) -> int:
        """Ranks in the data-parallel group."""
        return self.mesh.data


def build_process_groups(tensor_model_parallel_size: int, device: torch.device) -> ProcessGroups:
    """Make the groups of a world that ``torch.distributed`` has already set up.

    Every rank calls this once, with the same size; world size divisible by it.
    """
    if device.type == "cpu":
        adapt_megatron_to_cpu()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_model_parallel_size,
        create_gloo_process_groups=False,
    )
    return _initialised_groups(Mesh(dist.get_world_size(), tensor_model_parallel_size), device)


def build_single_process_groups(device: torch.device) -> ProcessGroups:
    """A world of one, without a launcher: for tools and single-rank tests.

    Made once per process: torch never ends the threads of a group, dozens for megatron's groups.
    """
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        return build_process_groups(1, device)
    if device.type == "cpu":
        adapt_megatron_to_cpu()
    return _initialised_groups(Mesh(1, 1), device)


def _initialised_groups(mesh: Mesh, device: torch.device) -> ProcessGroups:
    return ProcessGroups(
        tensor=_present(parallel_state.get_tensor_model_parallel_group()),
        data=_present(parallel_state.get_data_parallel_group()),
        mesh=mesh,
        rank=dist.get_rank(),
        device=device,
    )


def _present(group: dist.ProcessGroup | int | None) -> dist.ProcessGroup:
    """The group; torch gives a number or nothing to a process outside of it."""
    assert isinstance(group, dist.ProcessGroup)
    return group
