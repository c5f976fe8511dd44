"""Calibration of a machine: microbenchmarks whose results make a machine's profile.

Every rank measures its own device, and all ranks together the links between them. Rates are those
that the software reaches, at the shapes of a configuration's layers.
"""

from __future__ import annotations

import math
import socket
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional

from mot_megatron.config import Config
from mot_megatron.errors import ConfigError
from mot_megatron.job.hardware import synchronize

_ROUNDS = 9
"""Repeats of a measurement, of which the median counts."""
_ROUND_SECONDS = 0.05
"""A round repeats an operation until it has taken about this long."""
_COPIED_BYTES = {"cpu": 1 << 27, "cuda": 1 << 30}
_SIZES = {"cpu": (1 << 12, 1 << 24), "cuda": (1 << 12, 1 << 30)}
"""Smallest and largest message in bytes."""


@dataclass(frozen=True)
class Line:
    """Seconds of a collective: latency plus bytes over bandwidth."""

    latency: float
    """Seconds."""
    bandwidth: float
    """Bytes per second."""


def matrix_rate(config: Config, device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOPs per second of a layer's matrix products, all towers one after the other.

    The tokens of a micro-batch are divided equally among the towers.
    """
    model = config.model
    tokens = config.training.micro_batch_size * config.data.seq_length // model.num_towers
    h, ffn = model.hidden_size, model.feed_forward_size
    flops = seconds = 0.0
    for k, n in ((h, 3 * h), (h, h), (h, 2 * ffn), (ffn, h)):
        left = torch.randn(tokens, k, device=device, dtype=dtype)
        right = torch.randn(n, k, device=device, dtype=dtype)
        gradient = torch.randn(tokens, n, device=device, dtype=dtype)
        for product in (
            lambda a=left, b=right: a @ b.t(),
            lambda g=gradient, b=right: g @ b,
            lambda g=gradient, a=left: g.t() @ a,
        ):
            seconds += seconds_of(product, device)
            flops += 2 * tokens * k * n
    return flops / seconds


def attention_rate(config: Config, device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOPs per second of causal attention, forward and backward.

    Counted are pairs of a query and a visible key, seven products per pair.
    """
    model, length = config.model, config.data.seq_length
    heads = model.num_attention_heads
    shape = (1, heads, length, model.hidden_size // heads)
    query, key, value = (
        torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)
    )

    def both() -> None:
        output = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        output.backward(output)

    pairs = length * (length + 1) / 2
    return 7 * 2 * pairs * model.hidden_size / seconds_of(both, device)


def memory_rate(device: torch.device) -> float:
    """Return the bytes per second that a copy reads and writes."""
    source = torch.ones(_COPIED_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * 4 * source.numel() / seconds_of(lambda: target.copy_(source), device)


def collective_line(group: dist.ProcessGroup, device: torch.device) -> Line:
    """Return latency and bandwidth of all-gathers over a group. Collective over the group.

    The bandwidth is what a rank receives.
    """
    # torch 2.13 deprecates the name that earlier versions have.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    size = dist.get_world_size(group)
    lowest, highest = _SIZES[device.type]
    times: dict[float, float] = {}
    num_bytes = lowest
    while num_bytes <= highest:
        own = torch.ones(num_bytes // size, dtype=torch.uint8, device=device)
        whole = torch.empty(own.numel() * size, dtype=torch.uint8, device=device)

        def gather(whole: torch.Tensor = whole, own: torch.Tensor = own) -> None:
            dist.all_gather_into_tensor(whole, own, group=group)

        seconds = torch.tensor(seconds_of(gather, device, repeats=5), device=device)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX, group=group)
        times[whole.numel() * (size - 1) / size] = float(seconds)
        num_bytes *= 4
    return fit_line(times)


def fit_line(seconds: Mapping[float, float]) -> Line:
    """Fit latency and bandwidth to seconds by bytes, so that relative errors are small."""
    sizes = np.array(list(seconds))
    times = np.array(list(seconds.values()))
    # Least squares of (latency + size / bandwidth) / time - 1.
    matrix = np.stack([1 / times, sizes / times], axis=1)
    latency, per_byte = np.linalg.lstsq(matrix, np.ones_like(times), rcond=None)[0]
    return Line(max(float(latency), 1e-7), 1 / max(float(per_byte), 1e-15))


def seconds_of(
    operation: Callable[[], object], device: torch.device, repeats: int | None = None
) -> float:
    """Return the median seconds of an operation.

    Args:
        operation: Starts the work on the device.
        device: The device.
        repeats: Operations per round; None to choose them by time, which ranks would do
            differently.
    """

    def timed(count: int) -> float:
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(count):
            operation()
        synchronize(device)
        return (time.perf_counter() - begin) / count

    once = timed(2)
    count = repeats or max(1, round(_ROUND_SECONDS / max(once, 1e-7)))
    return float(np.median([timed(count) for _ in range(_ROUNDS)]))


@dataclass(frozen=True)
class DeviceRates:
    """Rates of the slowest device, per second."""

    matrices: float
    """FLOPs of matrix products."""
    attention: float
    """FLOPs of attention."""
    memory: float
    """Bytes that copies read and write."""


@dataclass(frozen=True)
class LinkRates:
    """Rates of the slowest rank's links, in bytes per second."""

    within: float
    """Of one device within a node."""
    between: float | None
    """Of one node to others; None on a single node."""
    latency: float
    """Seconds of latency of a collective per node, as in ``costs.collective_seconds``."""


def device_rates(config: Config, device: torch.device) -> DeviceRates:
    """Measure every rank's device. Collective over the world."""
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    mine = (
        matrix_rate(config, device, dtype),
        attention_rate(config, device, dtype),
        memory_rate(device),
    )
    return DeviceRates(*_slowest(mine, device))


def link_rates(per_node: int, nodes: int, device: torch.device) -> LinkRates:
    """Measure all-gathers within every node, and over all. Collective over the world."""
    within, _ = dist.new_subgroups(per_node)
    world = dist.group.WORLD
    assert isinstance(within, dist.ProcessGroup)
    assert world is not None
    lines = [collective_line(group, device) for group in (within, world)[: min(nodes, 2)]]
    bandwidths = _slowest([line.bandwidth for line in lines], device)
    latency = lines[-1].latency / (1 + math.log2(nodes))
    return LinkRates(bandwidths[0], bandwidths[1] if nodes > 1 else None, latency)


def ranks_per_node() -> tuple[int, int]:
    """Return the ranks of each node and the number of nodes. Collective over the world.

    Raises:
        ConfigError: Nodes have different numbers of ranks, a single one, or are mixed.
    """
    hosts = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    count = hosts.count(hosts[0])
    if count < 2 or hosts != [host for host in dict.fromkeys(hosts) for _ in range(count)]:
        raise ConfigError(
            "calibration needs two or more ranks per node, on each node the same number, and the"
            " ranks of a node one after the other"
        )
    return count, len(hosts) // count


def _slowest(rates: Sequence[float], device: torch.device) -> list[float]:
    values = torch.tensor(rates, dtype=torch.float64, device=device)
    dist.all_reduce(values, op=dist.ReduceOp.MIN)
    return values.tolist()
