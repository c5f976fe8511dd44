"""Reduction of gradients for ZeRO-1 in bf16: one reduce-scatter per bucket, under backward.

DeepSpeed's bf16 optimizer stores the fp32 gradients of a parameter group in one flat buffer, of
which each owner updates one piece. DeepSpeed all-reduces the whole buffer after the last backward,
in copies; a rank needs only its piece. Here every group is a bucket, which is reduce-scattered in
place as soon as the last micro-batch's backward has added its last gradient. Megatron's and
PyTorch's data-parallel engines do the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

_starting = False


def is_starting() -> bool:
    """Return whether a bucket's reduction is being started, for tools that record collectives."""
    return _starting


class BucketReduction:
    """Replaces how DeepSpeed's bf16 optimizer reduces gradients.

    The owners of several buckets must start them in the same order, although their gradients may
    become complete in another: a bucket waits for those of the same owners that come before it.
    Backward runs from the last layer to the first, so the bucket with the latest layers comes
    first.
    """

    def __init__(self, engine: Any, optimizer: Any, parameters: Sequence[nn.Parameter], steps: int):
        """Take over the reduction.

        Args:
            engine: DeepSpeed's engine.
            optimizer: Its bf16 optimizer.
            parameters: This rank's parameters in the model's order, the same for all owners.
            steps: Micro-batches per optimizer step; each adds one gradient to every parameter.
        """
        self._optimizer = optimizer
        self._groups: list[dist.ProcessGroup] = list(optimizer.real_dp_process_group)
        self._expected = [steps * len(members) for members in optimizer.bf16_groups]
        self._handles: dict[int, dist.Work | None] = {}
        self._missing = list(self._expected)
        position = {parameter: index for index, parameter in enumerate(parameters)}
        # What two pipeline stages hold is summed over them first, by ``ZeroEngine``.
        waits = [any(map(is_tied, members)) for members in optimizer.bf16_groups]
        self._waits_for_end = waits

        def order(bucket: int) -> tuple[bool, int]:
            return waits[bucket], -min(position[p] for p in optimizer.bf16_groups[bucket])

        self._order = sorted(range(len(self._groups)), key=order)
        accumulate = optimizer.accumulate_hp_grads_and_remove_lp

        def accumulate_and_start(parameter: nn.Parameter, group: int, index: int) -> None:
            accumulate(parameter, group, index)
            self._missing[group] -= 1
            if self._missing[group] == 0:
                self._start(self._started_early())

        optimizer.accumulate_hp_grads_and_remove_lp = accumulate_and_start
        engine.buffered_allreduce_fallback = self._finish

    def _started_early(self) -> Iterable[int]:
        """Return the buckets that are complete, as are all that come before them."""
        blocked: set[dist.ProcessGroup] = set()
        for bucket in self._order:
            if self._missing[bucket] or self._waits_for_end[bucket]:
                blocked.add(self._groups[bucket])
            elif self._groups[bucket] not in blocked:
                yield bucket

    @torch.no_grad()
    def _start(self, buckets: Iterable[int]) -> None:
        global _starting
        _starting = True
        for bucket in buckets:
            if bucket not in self._handles:
                group = self._groups[bucket]
                self._handles[bucket] = None
                if group.size() > 1:
                    self._handles[bucket] = dist.reduce_scatter_tensor(
                        self._optimizer.fp32_groups_gradient_flat_partition[bucket],
                        self._optimizer.fp32_groups_gradients_flat[bucket],
                        group=group,
                        async_op=True,
                    )
        _starting = False

    def _finish(self, *_: Any, **__: Any) -> None:
        """Start what is left, and wait for all; DeepSpeed calls this after the last backward."""
        self._start(self._order)
        for handle in self._handles.values():
            if handle is not None:
                handle.wait()
        self._handles.clear()
        self._missing = list(self._expected)


def is_tied(parameter: nn.Parameter) -> bool:
    """Return whether the first and the last pipeline stage both hold a parameter."""
    return getattr(parameter, "tied_across_stages", False)
