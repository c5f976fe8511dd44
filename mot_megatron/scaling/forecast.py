"""Forecast of a step's time from ledgers, a machine's profile and the cost model's constants.

The engine is taken as it is. ZeRO-1 in bf16 reduces gradients under the last backward pass, which
hides a part of them; nothing else overlaps, because DeepSpeed gathers and reduces on the stream
that computes. A part of a step takes its computation and its traffic one after the other, or the
host's time to start its kernels if that is longer. The ranks of a modality group wait for the
slowest of them in every part; the split is that of their mean. The time to read and prepare data is
not forecast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mot_megatron.config import Config
from mot_megatron.parallel.buckets import largest_bucket
from mot_megatron.scaling.costs import (
    Constants,
    WorkSeconds,
    adapted,
    collective_seconds,
    exposed,
    traffic_seconds,
    work_seconds,
)
from mot_megatron.scaling.ledger import (
    BACKWARD,
    FORWARD,
    OPTIMIZER,
    REDUCTION,
    Collective,
)
from mot_megatron.scaling.machine import Machine, group_shape
from mot_megatron.scaling.pipeline import pipeline_seconds
from mot_megatron.scaling.roles import Rehearsed

MATRICES, ATTENTION = "matrix products", "attention"
ELEMENTWISE, LAUNCHES = "other operators", "waiting for the host"
IMBALANCE, BUBBLE = "waiting for other towers", "pipeline bubble"
TIMED_PARTS = (FORWARD, BACKWARD, REDUCTION, OPTIMIZER)
"""Parts of a step that are forecast; reading data takes no time."""
_PIPELINE = "pipeline"
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Forecast:
    """The time of a step."""

    world_size: int
    tokens: int
    """Tokens of the step over all ranks."""
    seconds: float
    split: Mapping[str, float]
    """Seconds by cause; they sum to the step."""
    flops: float
    """FLOPs of the step over all ranks, recomputation included."""
    peak_bytes: int
    """Device memory of the fullest rank."""
    layout: Mapping[str, str | int]
    """Names and sizes of the layout."""

    def scaled(self, factor: float) -> Forecast:
        """Return the forecast with all times multiplied by ``factor``."""
        split = {cause: factor * seconds for cause, seconds in self.split.items()}
        return replace(self, seconds=factor * self.seconds, split=split)

    @property
    def tokens_per_gpu_second(self) -> float:
        """Tokens per second and GPU."""
        return self.tokens / self.seconds / self.world_size

    def utilization(self, machine: Machine) -> float:
        """Return the FLOPs per second over the peak of all devices."""
        peak = machine.matrix_tflops * 1e12 * self.world_size
        return self.flops / self.seconds / peak


Split = dict[str, float]
"""Seconds by cause."""


def forecast(
    config: Config,
    world_size: int,
    roles: Sequence[Rehearsed],
    machine: Machine,
    constants: Constants,
) -> Forecast:
    """Return the forecast of a step.

    Args:
        config: Resolved configuration.
        world_size: Number of ranks.
        roles: All roles of the layout, rehearsed.
        machine: Where the step would run.
        constants: Of the software.
    """
    constants = adapted(constants, machine)
    stages = 1 + max(each.role.stage for each in roles)
    parts: dict[str, list[list[Split]]] = {}
    for part in TIMED_PARTS:
        parts[part] = [[] for _ in range(stages)]
        for each in roles:
            parts[part][each.role.stage].append(_part(each, part, machine, constants))
    split = step_split(
        parts,
        roles[0].ledger.micro_batches,
        config.parallel.virtual_pipeline_model_parallel_size or 1,
        _message_seconds(roles, machine, constants),
        constants.overlap if reduces_under_backward(config) else 0.0,
    )
    ranks = world_size / len(roles)
    return Forecast(
        world_size,
        config.training.global_batch_size * config.data.seq_length,
        _total(split),
        split,
        flops=ranks * sum(each.ledger.flops().total() for each in roles),
        peak_bytes=max(each.ledger.memory.peak_on_gpu for each in roles),
        layout=layout_of(config),
    )


def reduces_under_backward(config: Config) -> bool:
    """Return whether the engine reduces gradients under the last backward pass."""
    parallel = config.parallel
    limit = largest_bucket(parallel.zero_stage, config.training.precision, parallel.offload)
    return limit is not None


def layout_of(config: Config) -> dict[str, str | int]:
    """Return the layout of a configuration by short names, for tables."""
    parallel = config.parallel
    exchange = parallel.modality_parallel_size > 1
    return {
        "tensor-parallel size": parallel.tensor_model_parallel_size,
        "pipeline stages": parallel.pipeline_model_parallel_size,
        "pieces per stage": parallel.virtual_pipeline_model_parallel_size or 1,
        "modality-parallel size": parallel.modality_parallel_size,
        "exchange": parallel.attention_exchange if exchange else "-",
        "expert-parallel size": parallel.expert_model_parallel_size,
        "ZeRO stage": parallel.zero_stage,
        "recomputation": config.training.recompute,
    }


def step_split(
    parts: Mapping[str, Sequence[Sequence[Split]]],
    micro_batches: int,
    pieces: int,
    message: float,
    overlap: float,
) -> Split:
    """Return the seconds of a step by cause.

    Args:
        parts: By part of the step, for each pipeline stage, the seconds of all micro-batches on
            each place in a modality group.
        micro_batches: Micro-batches per step.
        pieces: Pieces per stage.
        message: Seconds of a message between stages.
        overlap: Part of the last backward's computation that hides the reduction of gradients.
    """
    slowest = {
        part: [_slowest(splits) for splits in of_stages] for part, of_stages in parts.items()
    }
    schedule = pipeline_seconds(
        [_total(split) / micro_batches for split in slowest[FORWARD]],
        [_total(split) / micro_batches for split in slowest[BACKWARD]],
        micro_batches,
        pieces=pieces,
        message=message,
    )
    passes = [_sum(pair) for pair in zip(slowest[FORWARD], slowest[BACKWARD], strict=True)]
    split = max(passes, key=_total)
    split = {**split, BUBBLE: max(0.0, schedule - _total(split))}
    split[REDUCTION] = max(
        exposed(_computation(backward) / micro_batches, _total(reduction), overlap)
        for backward, reduction in zip(slowest[BACKWARD], slowest[REDUCTION], strict=True)
    )
    split[OPTIMIZER] = max(_total(each) for each in slowest[OPTIMIZER])
    return {cause: seconds for cause, seconds in split.items() if seconds > _ROUNDING * schedule}


def part_split(seconds: WorkSeconds, starting: float, traffic: Split) -> Split:
    """Return the seconds of a part of a step by cause, with those of waiting for the host.

    Args:
        seconds: Of computation.
        starting: Seconds in which the host starts the kernels.
        traffic: Seconds by axis.
    """
    split = {
        MATRICES: seconds.matrices,
        ATTENTION: seconds.attention,
        ELEMENTWISE: seconds.memory,
        **{f"traffic: {axis}": spent for axis, spent in traffic.items()},
    }
    return {**split, LAUNCHES: max(0.0, starting - _total(split))}


def _part(each: Rehearsed, part: str, machine: Machine, constants: Constants) -> Split:
    ledger = each.ledger
    traffic = {
        collective: times
        for collective, times in ledger.tally.traffic.items()
        if collective.part == part and collective.axis != _PIPELINE
    }
    nodes = int(machine.devices_per_node)
    shapes = {axis: group_shape(ranks, nodes) for axis, ranks in ledger.members.items()}
    work = ledger.tally.work[part]
    return part_split(
        work_seconds(work, machine, constants),
        work.launches * machine.launch_us * 1e-6,
        traffic_seconds(traffic, shapes, machine, constants),
    )


def _slowest(splits: Sequence[Split]) -> Split:
    """Return the mean split of several roles, and how long they wait for the slowest."""
    slowest = max(map(_total, splits))
    mean = {cause: seconds / len(splits) for cause, seconds in _sum(splits).items()}
    return {**mean, IMBALANCE: slowest - _total(mean)}


def _sum(splits: Sequence[Split]) -> Split:
    causes = dict.fromkeys(cause for split in splits for cause in split)
    return {cause: sum(split.get(cause, 0.0) for split in splits) for cause in causes}


def _total(split: Split) -> float:
    return sum(split.values())


def _computation(split: Split) -> float:
    return sum(split.get(cause, 0.0) for cause in (MATRICES, ATTENTION, ELEMENTWISE))


def _message_seconds(roles: Sequence[Rehearsed], machine: Machine, constants: Constants) -> float:
    """Return the seconds of the slowest message between stages."""
    nodes = int(machine.devices_per_node)
    slowest = 0.0
    for each in roles:
        messages: list[Collective] = [
            collective for collective in each.ledger.tally.traffic if collective.axis == _PIPELINE
        ]
        for message in messages:
            shape = group_shape(each.ledger.members[_PIPELINE], nodes)
            seconds = collective_seconds(message.kind, message.num_bytes, shape, machine, constants)
            slowest = max(slowest, seconds)
    return slowest
