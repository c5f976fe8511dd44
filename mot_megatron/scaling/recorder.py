"""Recording of a ledger: a mode that sees each operation as PyTorch dispatches it.

It works on real tensors and on fake ones alike.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections import Counter
from collections.abc import Mapping
from typing import Any, Self
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from mot_megatron.job.progress_report import ProgressReport
from mot_megatron.optim import reduction
from mot_megatron.parallel.collectives import collective_call, tensor_bytes, tensors_in
from mot_megatron.scaling.balanced_routing import KnownCounts
from mot_megatron.scaling.ledger import (
    BACKWARD,
    BACKWARD_OF_ATTENTION,
    DATA,
    FORWARD,
    OPTIMIZER,
    PARTS,
    REDUCTION,
    Collective,
    Ledger,
    Memory,
    Product,
    Tally,
    Work,
)
from mot_megatron.scaling.valueless import value_read_by_host

_FACTORS = {"mm": 0, "addmm": 1, "addmm_": 1, "bmm": 0, "baddbmm": 1}
"""Operators of matrix products, and the position of their first factor."""
_WITHOUT_KERNEL = (
    *("empty", "empty_like", "new_empty", "empty_strided", "detach", "lift_fresh"),
    "scalar_tensor",
    "_local_scalar_dense",
)
_OVERWRITING = ("copy_", "fill_", "zero_", "random_", "normal_", "uniform_")
"""Operators in place that do not read what they overwrite."""
_OF_ROWS = ("index", "index_select", "embedding", "gather")
"""Operators that read only as many elements of their first argument as they return."""
_INTO_ROWS = ("index_put_", "index_add_", "scatter_add_", "index_copy_")
"""Operators in place that touch only as many elements as they are given."""
_OF_EXPERTS = ("masked_select", "_grouped_mm")
_RUN_BACKWARD = "_engine_run_backward"
"""Function of torch.autograd through which all backward passes start."""
_PHASES = {"data": DATA, "optimizer": OPTIMIZER}


class LedgerRecorder(TorchDispatchMode):
    """Records what this process does while the recorder is active; then call ``ledger``.

    Raises:
        NotImplementedError: A collective occurs that the ledger does not know.
    """

    def __init__(
        self,
        axes: Mapping[str, str],
        progress_report: ProgressReport,
        counts: KnownCounts | None = None,
    ) -> None:
        """Record into a new ledger.

        Args:
            axes: Axis by name of the process group.
            progress_report: Names the phase of the step.
            counts: How many rows experts take; needed for experts without values.
        """
        super().__init__()
        self._axes = axes
        self._progress_report = progress_report
        self._counts = counts
        self._work = {part: Work() for part in PARTS}
        self._collectives: list[Collective] = []
        # Since the last backward: forward if another backward follows, otherwise reduction.
        self._pending = Work()
        self._first_pending = 0
        self._seen_backward = False
        self._depth = 0
        self._members: dict[str, tuple[int, ...]] = {}
        self._memory = _LiveMemory()
        self._at_last_backward = self._before_last_backward = self._tally()

    def ledger(self, micro_batches: int) -> Ledger:
        """Return the ledger of the step that was recorded, of ``micro_batches``."""
        self._settle(REDUCTION)
        order = list(self._collectives)
        return Ledger(
            micro_batches,
            self._tally(),
            order,
            micro_batches,
            self._memory.result,
            self._members,
        )

    def of_one_micro_batch(self) -> Tally:
        """Return what happened between the starts of the last two backward passes.

        Without a pipeline, this is what each further micro-batch adds to a step of three.
        """
        return self._at_last_backward.plus(self._before_last_backward, -1)

    def _tally(self) -> Tally:
        empty = Tally({part: Work() for part in PARTS}, Counter())
        return empty.plus(Tally(self._work, Counter(self._collectives)), 1)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled under a recorder, and skipping takes long

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and record it."""
        del types
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return value_read_by_host(args[0].dtype)
        name = func._overloadpacket.__name__
        if name in _OF_EXPERTS and args[0].is_meta:
            assert self._counts is not None, "experts without values need their counts"
            result = _fake_result(name, args, kwargs, self._counts)
        else:
            result = func(*args, **kwargs)
        if func.namespace == "prim":
            return result
        part, work = self._current()
        if func.namespace == "c10d":
            self._record_collective(name, args, part)
        elif not func.is_view and name not in _WITHOUT_KERNEL:
            work.launches += 1
            if name in _FACTORS:
                work.products[_product(args[_FACTORS[name]], result)] += 1
            elif name == "_grouped_mm":
                work.products.update(_grouped_products(args[0], args[1], result))
            elif name.startswith("_scaled_dot_product"):
                work.attention_flops += _attention_flops(args, "backward" in name)
                work.attention_calls += 1
            else:
                work.memory_bytes += _bytes_moved(func, name, args, kwargs, result)
        self._memory.see(result, part)
        return result

    def __enter__(self) -> Self:
        """Start recording."""
        run_backward = getattr(torch.autograd, _RUN_BACKWARD)

        def watched(*args: Any, **kwargs: Any) -> Any:
            self._start_backward()
            try:
                return run_backward(*args, **kwargs)
            finally:
                self._depth -= 1
                self._first_pending = len(self._collectives)

        wait = dist.Work.wait

        def wait_unrecorded(*args: Any, **kwargs: Any) -> Any:
            with _disable_current_modes():
                return wait(*args, **kwargs)

        self._patches = contextlib.ExitStack()
        self._patches.enter_context(mock.patch.object(torch.autograd, _RUN_BACKWARD, watched))
        # gloo copies results while a rank waits for them.
        self._patches.enter_context(mock.patch.object(dist.Work, "wait", wait_unrecorded))
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        """Stop recording."""
        super().__exit__(*exception)
        self._patches.close()

    def _start_backward(self) -> None:
        self._depth += 1
        if self._depth == 1:  # recomputation calls backward inside of backward
            self._settle(FORWARD)
            self._before_last_backward = self._at_last_backward
            self._at_last_backward = self._tally()
            self._seen_backward = True

    def _current(self) -> tuple[str, Work]:
        """Return the part of the step that runs now, and where its work is added."""
        part = _PHASES.get(self._progress_report.now.name, FORWARD)
        if self._depth:
            return BACKWARD, self._work[BACKWARD]
        if part == FORWARD:
            return part, self._pending
        if self._seen_backward:
            self._settle(REDUCTION)
        return part, self._work[part]

    def _settle(self, part: str) -> None:
        """Decide which part the work since the last backward belongs to."""
        self._work[part].add(self._pending)
        self._pending = Work()
        pending = self._collectives[self._first_pending :]
        self._collectives[self._first_pending :] = [
            each._replace(part=part) if each.part == FORWARD else each for each in pending
        ]
        self._first_pending = len(self._collectives)

    def _record_collective(self, name: str, args: Any, part: str) -> None:
        call = collective_call(name, args)
        if call is None:
            return
        group = call.group
        axis = self._axes.get(group.group_name, group.group_name)
        if axis not in self._members:
            self._members[axis] = tuple(dist.get_process_group_ranks(group))
        if part == BACKWARD and reduction.is_starting():
            part = REDUCTION
        collective = Collective(part, call.kind, axis, group.size(), call.num_bytes)
        self._collectives.append(collective)


class _LiveMemory:
    """The bytes of all tensors that are alive, by their storages."""

    def __init__(self) -> None:
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._now = 0
        self.result = Memory()
        for tensor in gc.get_objects():
            if isinstance(tensor, torch.Tensor):
                self._add(tensor)
        self.result.state = self._now

    def see(self, result: Any, part: str) -> None:
        """Take note of the tensors that an operator of a part of the step has returned."""
        for tensor in tensors_in(result):
            self._add(tensor)
        if self._now > self.result.peak:
            self.result.peak, self.result.peak_part = self._now, part

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        size = storage.nbytes()

        def forget(_: object) -> None:
            self._now -= size
            self._alive.pop(key, None)

        self._alive[key] = weakref.ref(storage, forget)
        self._now += size


def _product(first: torch.Tensor, result: torch.Tensor) -> Product:
    *batch, m, k = first.shape
    return Product(batch[0] if batch else 1, m, k, result.shape[-1], result.element_size())


def _fake_result(name: str, args: Any, kwargs: Any, counts: KnownCounts) -> torch.Tensor:
    """Return what torch cannot tell without values: it depends on values, or needs bf16."""
    first, second = args[:2]
    if name == "masked_select":
        return first.new_empty(counts.selected)
    of_weights = first.ndim == second.ndim
    experts = [len(kwargs.get("offs", args[2] if len(args) > 2 else ()))] if of_weights else []
    return first.new_empty([*experts, first.shape[0], second.shape[-1]])


def _grouped_products(
    first: torch.Tensor, second: torch.Tensor, result: torch.Tensor
) -> Counter[Product]:
    """Return the products of experts that take equally many rows, up to one."""
    of_weights = first.ndim == second.ndim  # [m, r] times [r, n] gives [e, m, n]
    rows, experts = (first.shape[1], len(result)) if of_weights else (len(first), len(second))
    share, rest = divmod(rows, experts)
    found: Counter[Product] = Counter()
    for batch, count in ((rest, share + 1), (experts - rest, share)):
        m, k = (first.shape[0], count) if of_weights else (count, first.shape[1])
        if batch and count:
            found[Product(batch, m, k, result.shape[-1], result.element_size())] += 1
    return found


def _attention_flops(args: Any, backward: bool) -> int:
    # The gradient of the output comes first in backward; it has the shape of the queries.
    batch, heads, tokens, head_dim = args[0].shape
    pairs = batch * tokens * (tokens + 1) // 2
    return int(4 * pairs * heads * head_dim * (BACKWARD_OF_ATTENTION if backward else 1))


def _bytes_moved(func: Any, name: str, args: Any, kwargs: Any, result: Any) -> int:
    """Return the bytes that an operator reads and writes."""
    if name in _OF_ROWS:
        return 2 * tensor_bytes(result) + sum(map(tensor_bytes, tensors_in((args[1:], kwargs))))
    if name in _INTO_ROWS:
        return 3 * tensor_bytes(args[-1] if isinstance(args[-1], torch.Tensor) else args[2])
    written = read = 0
    for position, argument in enumerate(func._schema.arguments):
        value = kwargs.get(argument.name)
        if value is None and position < len(args):
            value = args[position]
        size = sum(map(tensor_bytes, tensors_in(value)))
        if argument.is_write:
            written += size
        if not (argument.is_write and name in _OVERWRITING):
            read += size
    in_place = any(argument.is_write for argument in func._schema.arguments)
    if not in_place:
        written = sum(map(tensor_bytes, tensors_in(result)))
    return read + written
