"""Collectives as PyTorch dispatches them: their kind, their group and their bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import ProcessGroup
from torch.utils._pytree import tree_iter

_KINDS: Mapping[str, tuple[str, int, int]] = {
    "allreduce_": ("all-reduce", 1, 0),
    "_allgather_base_": ("all-gather", 2, 0),
    "allgather_": ("all-gather", 2, 0),
    "_reduce_scatter_base_": ("reduce-scatter", 2, 1),
    "reduce_scatter_": ("reduce-scatter", 2, 1),
    "alltoall_base_": ("all-to-all", 2, 1),
    "broadcast_": ("broadcast", 1, 0),
    "reduce_": ("reduce", 1, 0),
    "send": ("send", 1, 0),
    "recv_": ("receive", 1, 0),
}
"""By name in torch.ops.c10d: kind, and positions of the group and of the counted tensors."""
_SYNCHRONIZATIONS = ("barrier", "monitored_barrier_")


class CollectiveCall(NamedTuple):
    """One collective or message, as one rank takes part in it."""

    kind: str
    """all-reduce, all-gather, reduce-scatter, all-to-all, broadcast, reduce, send or receive."""
    group: dist.ProcessGroup
    num_bytes: int
    """Bytes of the whole tensor: the result of an all-gather, the input of a reduce-scatter, what
    this rank sends in an all-to-all, otherwise the tensor itself."""

    @property
    def sent_bytes(self) -> float:
        """Bytes that a rank sends on average, in a ring or directly.

        For n ranks and B bytes: 2 B (n - 1) / n in an all-reduce; B (n - 1) / n in an all-gather, a
        reduce-scatter and a balanced all-to-all; B in a message, a broadcast and a reduction to one
        rank; none for the receiver.
        """
        if self.kind == "receive":
            return 0.0
        if self.kind in ("send", "broadcast", "reduce"):
            return float(self.num_bytes)
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * self.num_bytes * (1 - 1 / self.group.size())


def collective_call(name: str, args: Any) -> CollectiveCall | None:
    """Return what an operator of torch.ops.c10d does; None if it moves nothing.

    Args:
        name: Name of the operator.
        args: Its arguments.

    Raises:
        NotImplementedError: The collective is unknown.
    """
    if name in _SYNCHRONIZATIONS:
        return None
    if name not in _KINDS:
        raise NotImplementedError(f"unknown collective c10d.{name}")
    kind, of_group, of_tensors = _KINDS[name]
    group = ProcessGroup.unbox(args[of_group])
    if group.size() == 1:
        return None
    return CollectiveCall(kind, group, sum(map(tensor_bytes, tensors_in(args[of_tensors]))))


def tensors_in(values: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested lists, tuples and dictionaries."""
    return (leaf for leaf in tree_iter(values) if isinstance(leaf, torch.Tensor))


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()
