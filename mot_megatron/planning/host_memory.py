"""Host memory in closed form: the bytes that one rank of a GPU job needs to start and to resume.

Start: a rank builds its whole part of the model (its pipeline stage, towers and tensor-parallel
shard) on the host before moving it to the GPU. Linear layers and vocabulary matrices are built in
the training precision; norms, routers and experts are built in fp32. To initialize a matrix, the
rank draws the whole global matrix in fp32 and keeps its shard. Every rank does this, whatever the
ZeRO stage, with up to ``DRAWN_AT_ONCE`` matrices at a time, of which the largest are counted.

Resume: after that, the rank reads fp32 weights and both moments of its whole part, 12 bytes per
parameter, or 4 if it is frozen, and copies its share to the device. An offloaded optimizer is in
host memory as well.

Not counted: what Python, CUDA and the libraries take (a few GB per rank), pinned copies of an
offloaded optimizer, and file buffers. DeepSpeed is assumed to build its flat weight buffers on the
GPU, as it does if there is room; otherwise it holds a group's weights on the host twice.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from mot_megatron.config import Config
from mot_megatron.model.initialization import DRAWN_AT_ONCE
from mot_megatron.model.inventory import HeldParameter

_FP32 = 4
_RESUMED = 3 * _FP32
"""Bytes per element when resuming: the weight and both moments."""
_BUILT_IN_PRECISION = ("linear.weight", "lookup.weight")
"""Suffixes of the names of parameters of megatron's parallel layers."""


@dataclass(frozen=True)
class HostBytes:
    """Peak bytes of host memory on one rank."""

    start: int
    resume: int


def host_bytes(config: Config, held: Sequence[HeldParameter], offloaded: int) -> HostBytes:
    """Estimate a rank's host memory.

    Args:
        config: Resolved configuration.
        held: The rank's parameters.
        offloaded: Bytes of model state that stay in host memory during training.
    """
    built = sum(parameter.size * _built_width(config, parameter) for parameter in held)
    drawn = sum(heapq.nlargest(DRAWN_AT_ONCE, _drawn(config, held)))
    start = max(built + _FP32 * drawn, offloaded)
    read = sum(p.size * (_FP32 if p.frozen else _RESUMED) for p in held)
    resume = read + offloaded
    return HostBytes(start, max(start, resume))


def _built_width(config: Config, parameter: HeldParameter) -> int:
    """Return the bytes per element of a parameter when it is built on the host."""
    in_bf16 = config.training.precision == "bf16" and parameter.name.endswith(_BUILT_IN_PRECISION)
    return 2 if in_bf16 else _FP32


def _drawn(config: Config, held: Iterable[HeldParameter]) -> Iterator[int]:
    """Yield the elements of every tensor that is drawn; experts are drawn one by one."""
    for parameter in held:
        if len(parameter.shape) == 1:
            continue  # norms are not drawn
        elements, count = _global_elements(config, parameter)
        yield from itertools.repeat(elements, count)


def _global_elements(config: Config, parameter: HeldParameter) -> tuple[int, int]:
    """Return the elements of a whole global matrix, and how many such a parameter consists of."""
    parallel = config.parallel
    elements = parameter.size
    if parameter.tensor_parallel:
        elements *= parallel.tensor_model_parallel_size
    experts = config.model.experts_of_towers[parameter.tower] if parameter.experts else None
    if experts is None:
        return elements, 1
    stacked = experts.num_moe_experts // parallel.expert_model_parallel_size
    return elements // stacked, stacked
