"""Calibration of links: every kind of collective over the group of every axis, and messages.

All groups of an axis communicate at the same time, as in training, and the slowest counts.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from mot_megatron.config import Config
from mot_megatron.parallel.axes import WORLD, groups_by_axis
from mot_megatron.parallel.gather import values_of_all_ranks
from mot_megatron.scaling.calibrate import seconds_of
from mot_megatron.scaling.machine import GroupShape, Line, MeasuredGroup, group_shape
from mot_megatron.scaling.synthetic import build_groups, parse_shares

_NODE, _AND = "node", ", "
_MESSAGE = "send"
_SMALLEST_BYTES = 1 << 10
_LARGEST_BYTES = {"cpu": 1 << 26, "cuda": 1 << 30}
_STEP = 4
"""Ratio of a message's size to that of the next smaller one."""
_REPEATED_BYTES = 1 << 22
"""Messages up to this size are repeated in each round."""


@dataclass(frozen=True)
class Links:
    """What was measured of all links."""

    within: float
    """Bytes per second that a device receives in an all-gather over its node."""
    between: float | None
    """The same of a node in an all-gather over all nodes; None on a single node."""
    latency: float
    """Seconds of latency of an all-gather per node, as in ``costs.collective_seconds``."""
    groups: list[MeasuredGroup]


def measured_links(config: Config, per_node: int, nodes: int, device: torch.device) -> Links:
    """Measure the groups of a configuration's layout and messages. Collective over the world."""
    shares = parse_shares(list(config.model.modalities), [])
    of_config = build_groups(config, shares, device)
    within, _ = dist.new_subgroups(per_node)
    axes: dict[str, dist.ProcessGroup] = {}
    for axis, group in groups_by_axis(of_config, config.model.tower_names):
        axes.setdefault(axis, group)
    assert isinstance(within, dist.ProcessGroup)
    assert dist.group.WORLD is not None
    groups = measured_groups({**axes, _NODE: within, WORLD: dist.group.WORLD}, per_node, device)

    def gathers(axis: str) -> tuple[Line, float]:
        """Return the line of all-gathers, and the bytes that a rank receives per second."""
        (found,) = (group for group in groups if axis in group.axes.split(_AND))
        line, size = found.lines["all-gather"], found.shape.size
        return line, line.bandwidth * (size - 1) / size

    line, of_world = gathers(WORLD)
    return Links(
        gathers(_NODE)[1],
        of_world if nodes > 1 else None,
        line.latency / (1 + math.log2(nodes)),
        groups + measured_messages(per_node, nodes, device),
    )


def measured_groups(
    groups: Mapping[str, dist.ProcessGroup], per_node: int, device: torch.device
) -> list[MeasuredGroup]:
    """Measure all kinds of collectives over groups. Collective over the world.

    Args:
        groups: This rank's groups by axis. Other ranks may have other axes. Axes whose groups have
            the same ranks are measured once.
        per_node: Ranks of each node.
        device: This rank's device.
    """
    members = {axis: tuple(dist.get_process_group_ranks(each)) for axis, each in groups.items()}
    of_ranks = values_of_all_ranks(members)
    found = []
    for axes in _distinct(of_ranks):
        dist.barrier()
        own = groups.get(axes[0])
        lines = collective_lines(own, device) if own is not None else {}
        shapes = [
            group_shape(ranks[axes[0]], per_node) if axes[0] in ranks else None
            for ranks in of_ranks
        ]
        largest = max((shape for shape in shapes if shape), key=lambda shape: shape.size)
        everyone = [
            of_rank
            for of_rank, shape in zip(values_of_all_ranks(lines), shapes, strict=True)
            if shape == largest
        ]
        found.append(MeasuredGroup(_AND.join(axes), largest, _slowest(everyone)))
    return found


def measured_messages(per_node: int, nodes: int, device: torch.device) -> list[MeasuredGroup]:
    """Measure messages between two ranks of a node and of two nodes. Collective over the world."""
    rank = dist.get_rank()
    found = []
    # Between nodes, all ranks of a node send at the same time.
    for distance in (1, per_node)[: min(nodes, 2)]:
        peer = rank ^ 1 if distance == 1 else rank + per_node * (-1) ** (rank // per_node)
        in_pair = 0 <= peer < dist.get_world_size() and (
            distance > 1 or peer // per_node == rank // per_node
        )
        dist.barrier()
        lines = {_MESSAGE: message_line(peer, device)} if in_pair else {}
        shape = GroupShape(2, 2 if distance == 1 else 1)
        everyone = [each for each in values_of_all_ranks(lines) if each]
        found.append(MeasuredGroup("message", shape, _slowest(everyone)))
    return found


def collective_lines(group: dist.ProcessGroup, device: torch.device) -> dict[str, Line]:
    """Return the line of every kind of collective. Collective over the group."""
    # torch 2.13 deprecates the names that earlier versions have.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    size = dist.get_world_size(group)
    times: dict[str, dict[float, float]] = {}
    for num_bytes in _sizes(device):
        count = max(1, num_bytes // 4 // size)
        whole = torch.zeros(count * size, device=device)
        part, other = torch.zeros(count, device=device), torch.empty_like(whole)
        operations: dict[str, Callable[[], object]] = {
            "all-reduce": lambda x=whole: dist.all_reduce(x, group=group),
            "all-gather": lambda x=other, y=part: dist.all_gather_into_tensor(x, y, group=group),
            "reduce-scatter": lambda x=part, y=whole: dist.reduce_scatter_tensor(x, y, group=group),
            "all-to-all": lambda x=other, y=whole: dist.all_to_all_single(x, y, group=group),
            "broadcast": lambda x=whole: dist.broadcast(x, group_src=0, group=group),
            "reduce": lambda x=whole: dist.reduce(x, group_dst=0, group=group),
        }
        for kind, operation in operations.items():
            seconds = torch.tensor(_timed(operation, num_bytes, device), device=device)
            dist.all_reduce(seconds, op=dist.ReduceOp.MAX, group=group)
            times.setdefault(kind, {})[4.0 * whole.numel()] = float(seconds)
    return {kind: fit_line(of_sizes) for kind, of_sizes in times.items()}


def message_line(peer: int, device: torch.device) -> Line:
    """Return the line of a message to ``peer``, which measures at the same time."""
    first = dist.get_rank() < peer
    times: dict[float, float] = {}
    for num_bytes in _sizes(device):
        data = torch.zeros(num_bytes // 4, device=device)

        def there_and_back(data: torch.Tensor = data) -> None:
            for sends in (first, not first):
                if sends:
                    dist.send(data, peer)
                else:
                    dist.recv(data, peer)

        times[float(num_bytes)] = _timed(there_and_back, num_bytes, device) / 2
    return fit_line(times)


def fit_line(seconds: Mapping[float, float]) -> Line:
    """Fit latency and bandwidth to seconds by bytes, so that relative errors are small."""
    sizes = np.array(list(seconds))
    times = np.array(list(seconds.values()))
    # Least squares of (latency + size / bandwidth) / time - 1.
    matrix = np.stack([1 / times, sizes / times], axis=1)
    latency, per_byte = np.linalg.lstsq(matrix, np.ones_like(times), rcond=None)[0]
    return Line(max(float(latency), 1e-7), 1 / max(float(per_byte), 1e-15))


def _sizes(device: torch.device) -> Iterator[int]:
    num_bytes = _SMALLEST_BYTES
    while num_bytes <= _LARGEST_BYTES[device.type]:
        yield num_bytes
        num_bytes *= _STEP


def _timed(operation: Callable[[], object], num_bytes: int, device: torch.device) -> float:
    """Return the median seconds; all ranks repeat equally often."""
    small = num_bytes <= _REPEATED_BYTES
    return seconds_of(operation, device, repeats=5 if small else 1, rounds=7 if small else 3)


def _distinct(of_ranks: Sequence[Mapping[str, tuple[int, ...]]]) -> list[list[str]]:
    """Return the axes, in order; those whose groups are the same on all ranks are together."""
    names = dict.fromkeys(axis for ranks in of_ranks for axis in ranks)
    same: dict[tuple[tuple[int, ...] | None, ...], list[str]] = {}
    for axis in names:
        groups = tuple(ranks.get(axis) for ranks in of_ranks)
        if any(group and len(group) > 1 for group in groups):
            same.setdefault(groups, []).append(axis)
    return list(same.values())


def _slowest(everyone: Sequence[Mapping[str, Line]]) -> dict[str, Line]:
    return {
        kind: Line(
            max(lines[kind].latency for lines in everyone),
            min(lines[kind].bandwidth for lines in everyone),
        )
        for kind in everyone[0]
    }
