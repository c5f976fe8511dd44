"""Where the time of a training step goes: computation, and traffic by parallel axis."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from mot_megatron.job.progress_report import ProgressReport
from mot_megatron.parallel.axes import EXPERT, MODALITY, PIPELINE, TENSOR, TENSOR_EXPERT, WORLD
from mot_megatron.parallel.collectives import collective_call
from mot_megatron.train.step import StepSeconds

COMPUTE, OPTIMIZER, DATA = "computation", "optimizer", "data"
GRADIENTS, WEIGHTS = "gradient reduction", "gathering of weights"
WAITING, EXCHANGE = "waiting for slower ranks", "modality-parallel exchange"
_OF_AXIS = {
    TENSOR: "tensor-parallel traffic",
    MODALITY: EXCHANGE,
    PIPELINE: "pipeline messages and bubble",
    EXPERT: "expert dispatch",
    TENSOR_EXPERT: "expert dispatch",
}
TRAFFIC = (*dict.fromkeys(_OF_AXIS.values()), GRADIENTS, WEIGHTS)
CAUSES = (COMPUTE, OPTIMIZER, DATA, *TRAFFIC)
"""What the time of a step on one rank is divided into."""


class StepClock(TorchDispatchMode):
    """Times the collectives of this process by phase of the step and axis.

    On a GPU, it measures with events how long the stream that computes waits, so that only traffic
    which computation does not hide counts. A collective includes the time for which a rank waits
    for others to take part. Every operator becomes slower by some microseconds of the host.
    """

    def __init__(
        self, axes: Mapping[str, str], progress_report: ProgressReport, device: torch.device
    ) -> None:
        """Create a clock that stands still until it is entered.

        Args:
            axes: Axis by name of the process group.
            progress_report: Names the phase of the step.
            device: Device of this rank.
        """
        super().__init__()
        self._axes = axes
        self._progress_report = progress_report
        self._on_gpu = device.type == "cuda"
        self._last_axis = WORLD
        self._depth = 0
        self._times: list[tuple[tuple[str, str], Any, Any]] = []
        self._sent: Counter[tuple[str, str]] = Counter()

    def take(self) -> Counter[tuple[str, str]]:
        """Return and forget the seconds by phase and axis. Waits for the device."""
        if self._on_gpu:
            torch.cuda.synchronize()
        found: Counter[tuple[str, str]] = Counter()
        for key, begin, end in self._times:
            found[key] += begin.elapsed_time(end) / 1000 if self._on_gpu else end - begin
        self._times.clear()
        return found

    def take_sent(self) -> dict[str, int]:
        """Return and forget the bytes that this rank has sent, by cause of ``TRAFFIC``.

        They are those of ring algorithms; see ``CollectiveCall.sent_bytes``.
        """
        found = dict.fromkeys(TRAFFIC, 0)
        for (phase, axis), count in self._sent.items():
            if phase != "data":
                cause = WEIGHTS if phase == "optimizer" else _OF_AXIS.get(axis, GRADIENTS)
                found[cause] += count
        self._sent.clear()
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and time it if it is a collective."""
        del types
        if func.namespace != "c10d":
            return func(*args, **(kwargs or {}))
        call = collective_call(func._overloadpacket.__name__, args)
        if call is not None:
            self._last_axis = self._axes.get(call.group.group_name, WORLD)
            key = self._progress_report.now.name, self._last_axis
            self._sent[key] += round(call.sent_bytes)
        with self._timed():
            return func(*args, **(kwargs or {}))

    def __enter__(self) -> Self:
        """Start the clock."""
        wait = dist.Work.wait

        def timed_wait(*args: Any, **kwargs: Any) -> Any:
            # It belongs to the collective that was started last.
            with self._timed():
                return wait(*args, **kwargs)

        self._patches = contextlib.ExitStack()
        self._patches.enter_context(mock.patch.object(dist.Work, "wait", timed_wait))
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        """Stop the clock."""
        super().__exit__(*exception)
        self._patches.close()

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        self._depth += 1
        begin = self._now()
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                key = self._progress_report.now.name, self._last_axis
                self._times.append((key, begin, self._now()))

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def split_step(seconds: StepSeconds, traffic: Mapping[tuple[str, str], float]) -> dict[str, float]:
    """Return the seconds of a step on one rank by cause; they sum to the step.

    Args:
        seconds: Of the phases of the step.
        traffic: From ``StepClock.take``.
    """
    found = dict.fromkeys(CAUSES, 0.0)
    found[DATA] = seconds.data
    found[COMPUTE], found[OPTIMIZER] = seconds.forward_backward, seconds.optimizer
    for (phase, axis), spent in traffic.items():
        if phase == "forward and backward":
            found[_OF_AXIS.get(axis, GRADIENTS)] += spent
            found[COMPUTE] -= spent
        elif phase == "optimizer":
            found[WEIGHTS] += spent
            found[OPTIMIZER] -= spent
    return found


def without_waiting(of_ranks: Sequence[Mapping[str, float]], exchange: float) -> dict[str, float]:
    """Return the mean split of ranks with the same role in a step.

    The rank that comes last to a collective does not wait, so that its time is the transfer's; the
    others' additional time is counted as waiting.

    Args:
        of_ranks: Seconds by cause of each rank.
        exchange: Seconds of the modality-parallel exchange on the rank that takes least, of all
            places in the modality groups: they exchange with each other.
    """
    mean = {cause: sum(split[cause] for split in of_ranks) / len(of_ranks) for cause in of_ranks[0]}
    mean[WAITING] = 0.0
    for cause in TRAFFIC:
        transfer = min(split[cause] for split in of_ranks)
        if cause == EXCHANGE:
            transfer = exchange
        mean[WAITING] += mean[cause] - transfer
        mean[cause] = transfer
    return mean
