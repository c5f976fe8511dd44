"""Calibration of devices: microbenchmarks whose results go into a machine's profile.

Every rank measures its own device. Rates are those that the software reaches, at the shapes of a
configuration's layers.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional

from mot_megatron.config import Config
from mot_megatron.errors import ConfigError
from mot_megatron.job.hardware import synchronize
from mot_megatron.parallel.gather import values_of_all_ranks

_ROUNDS = 9
"""Repeats of a measurement, of which the median counts."""
_ROUND_SECONDS = 0.05
"""A round repeats an operation until it has taken about this long."""
_COPIED_BYTES = {"cpu": 1 << 27, "cuda": 1 << 30}
_STARTED = 1000
"""Operators that are started in a row; a GPU's queue holds about that many."""


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


def launch_seconds(device: torch.device) -> float:
    """Return the seconds of the host to start one small operator, without autograd."""
    small = torch.zeros(1, device=device)
    times = []
    for _ in range(_ROUNDS):
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(_STARTED):
            small.add_(1.0)
        times.append((time.perf_counter() - begin) / _STARTED)
    synchronize(device)
    return float(np.median(times))


def seconds_of(
    operation: Callable[[], object],
    device: torch.device,
    repeats: int | None = None,
    rounds: int = _ROUNDS,
) -> float:
    """Return the median seconds of an operation.

    Args:
        operation: Starts the work on the device.
        device: The device.
        repeats: Operations per round; None to choose them by time, which ranks would do
            differently.
        rounds: Rounds, of which the median counts.
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
    return float(np.median([timed(count) for _ in range(rounds)]))


@dataclass(frozen=True)
class DeviceRates:
    """Rates of the slowest device, per second."""

    matrices: float
    """FLOPs of matrix products."""
    attention: float
    """FLOPs of attention."""
    memory: float
    """Bytes that copies read and write."""
    launches: float
    """Operators that the host starts."""


def device_rates(config: Config, device: torch.device) -> DeviceRates:
    """Measure every rank's device. Collective over the world."""
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    mine = (
        matrix_rate(config, device, dtype),
        attention_rate(config, device, dtype),
        memory_rate(device),
        1 / launch_seconds(device),
    )
    return DeviceRates(*_slowest(mine, device))


def ranks_per_node() -> tuple[int, int]:
    """Return the ranks of each node and the number of nodes. Collective over the world.

    Raises:
        ConfigError: Nodes have different numbers of ranks, a single one, or are mixed.
    """
    hosts = values_of_all_ranks(socket.gethostname())
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
