"""The ledger of a training step: every collective and every matrix product of one rank, counted.

A recorder sees each operation as PyTorch dispatches it, on real tensors and on fake ones alike.
Collectives over a group of one rank send nothing and are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import ProcessGroup
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mot_megatron.job.progress_report import ProgressReport
from mot_megatron.parallel.groups import ProcessGroups

MATRICES, ATTENTION = "matrix products", "attention"
WORLD = "world"


@dataclass(frozen=True)
class Collective:
    """One collective or message, as one rank takes part in it."""

    phase: str
    """Phase of the step, as ``ProgressReport.enter`` named it."""
    kind: str
    """all-reduce, all-gather, reduce-scatter, all-to-all, broadcast, send or receive."""
    axis: str
    """The process group by its role; see ``axes_of``."""
    group_size: int
    num_bytes: int
    """Bytes of the whole tensor: the result of an all-gather, the input of a reduce-scatter, what
    this rank sends in an all-to-all, otherwise the tensor itself."""


@dataclass
class Ledger:
    """What one rank does in one training step."""

    collectives: list[Collective] = field(default_factory=list)
    """In the order in which the rank starts them."""
    flops: Counter[str] = field(default_factory=Counter)
    """FLOPs of matrix products and attention; a multiplication and an addition are two. Attention
    counts the pairs of a query and a visible key only."""

    def by_axis(self) -> dict[tuple[str, str, str, int], tuple[int, int]]:
        """Return count and total bytes by phase, kind, axis and group size, in order of use."""
        found: dict[tuple[str, str, str, int], tuple[int, int]] = {}
        for each in self.collectives:
            key = (each.phase, each.kind, each.axis, each.group_size)
            count, total = found.get(key, (0, 0))
            found[key] = (count + 1, total + each.num_bytes)
        return found

    def document(self) -> dict[str, Any]:
        """Return the ledger as values that JSON can hold."""
        return {
            "flops": dict(self.flops),
            "collectives": [asdict(each) for each in self.collectives],
        }


_COLLECTIVES: Mapping[str, tuple[str, int, int]] = {
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
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
_BACKWARD_OF_ATTENTION = 2.5
"""Matrix products of attention's backward over those of its forward: five instead of two, because
the kernels recompute the scores (FlashAttention-2, arXiv 2307.08691, section 3.1)."""


class LedgerRecorder(TorchDispatchMode):
    """Fills a ledger with what this process does while the recorder is active.

    Raises:
        NotImplementedError: A collective occurs that the ledger does not know.
    """

    def __init__(self, axes: Mapping[str, str], progress_report: ProgressReport) -> None:
        """Record into a new ledger.

        Args:
            axes: Axis by name of the process group.
            progress_report: Names the phase of the step.
        """
        super().__init__()
        self.ledger = Ledger()
        self._axes = axes
        self._progress_report = progress_report

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and record it."""
        del types
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return value_read_by_host(args[0].dtype)
        result = func(*args, **kwargs)
        name = func._overloadpacket.__name__
        if func.namespace == "c10d":
            self._record_collective(name, args)
        elif name in _PRODUCTS:
            flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=result)
            self.ledger.flops[MATRICES] += int(flops)
        elif name.startswith("_scaled_dot_product"):
            self._record_attention(name, args)
        return result

    def _record_collective(self, name: str, args: Any) -> None:
        if name in _SYNCHRONIZATIONS:
            return
        if name not in _COLLECTIVES:
            raise NotImplementedError(f"the ledger does not know the collective c10d.{name}")
        kind, of_group, of_tensors = _COLLECTIVES[name]
        group = ProcessGroup.unbox(args[of_group])
        if group.size() == 1:
            return
        self.ledger.collectives.append(
            Collective(
                phase=self._progress_report.now.name,
                kind=kind,
                axis=self._axes.get(group.group_name, group.group_name),
                group_size=group.size(),
                num_bytes=_num_bytes(args[of_tensors]),
            )
        )

    def _record_attention(self, name: str, args: Any) -> None:
        backward = "backward" in name
        # The gradient of the output comes first in backward; it has the shape of the queries.
        batch, heads, tokens, head_dim = args[0].shape
        pairs = batch * tokens * (tokens + 1) // 2
        flops = 4 * pairs * heads * head_dim
        self.ledger.flops[ATTENTION] += int(flops * (_BACKWARD_OF_ATTENTION if backward else 1))


def axes_of(groups: ProcessGroups, tower_names: Iterable[str]) -> dict[str, str]:
    """Return the role of every process group of a rank, by the group's name.

    A group that has several roles, such as a tower's holders if all data-parallel ranks hold it,
    gets the first: tensor, pipeline, modality, data, tower NAME, model (tensor and pipeline),
    embedding (first and last stage), world.
    """
    assert dist.group.WORLD is not None
    # Empty without modality parallelism.
    holders = zip(tower_names, groups.holders, strict=False)
    named = [
        ("tensor", groups.tensor),
        ("pipeline", groups.pipeline),
        ("modality", groups.modality),
        ("data", groups.data),
        *((f"tower {name}", group) for name, group in holders),
        ("model", groups.model),
        ("embedding", groups.embedding),
        (WORLD, dist.group.WORLD),
    ]
    axes: dict[str, str] = {}
    for axis, group in named:
        if group is not None:
            axes.setdefault(group.group_name, axis)
    return axes


def _num_bytes(tensors: Any) -> int:
    leaves = (leaf for leaf in tree_leaves(tensors) if isinstance(leaf, torch.Tensor))
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves)


def value_read_by_host(dtype: torch.dtype) -> bool | int | float:
    """Return the value that a fake tensor has where the host reads it.

    Norms are finite, counts are positive, and nothing asks the run to stop.
    """
    if dtype == torch.bool:
        return False
    return 1.0 if dtype.is_floating_point else 1
