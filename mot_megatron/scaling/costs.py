"""Costs of work and traffic on a machine: rooflines, and latency and bandwidth of collectives.

A matrix product takes the longer of its FLOPs and its bytes at the rates that the software reaches,
which are fractions of the data sheet's. A collective over n ranks of which g share a node takes
its bytes at the slower of the link within the node and g shares of the network, as NCCL's rings use
the adapters of all their ranks, and a latency per node.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, fields, replace

from mot_megatron.errors import ConfigError
from mot_megatron.scaling.ledger import Collective, Work
from mot_megatron.scaling.machine import GroupShape, Machine


@dataclass(frozen=True)
class Constants:
    """What a software stack makes of a machine; six numbers with a physical meaning each."""

    matrix_efficiency: float = 0.7
    """Part of the peak that large matrix products reach."""
    attention_efficiency: float = 0.5
    """Part of the peak that attention reaches."""
    memory_efficiency: float = 0.8
    """Part of the memory's bandwidth that other operators reach."""
    network_efficiency: float = 0.6
    """Part of the bandwidth between and within nodes that collectives reach."""
    latency_us: float = 20.0
    """Microseconds of latency of a collective per node of its group."""
    overlap: float = 0.9
    """Part of the shorter of computation and traffic that the longer one hides, where the stack
    overlaps them at all."""


RANGES: Mapping[str, tuple[float, float]] = {
    "matrix_efficiency": (0.3, 0.95),
    "attention_efficiency": (0.15, 0.8),
    "memory_efficiency": (0.3, 0.95),
    "network_efficiency": (0.2, 0.95),
    "latency_us": (2.0, 200.0),
    "overlap": (0.0, 1.0),
}
"""Physically possible values of each constant."""


def adapted(constants: Constants, machine: Machine) -> Constants:
    """Return the constants for a machine, some of whose rates were measured.

    A measured rate is reached in full. Efficiencies stay for rates of data sheets.
    """
    changes: dict[str, float] = {}
    for name, field in (
        ("matrix_efficiency", "matrix_tflops"),
        ("memory_efficiency", "memory_tb_per_s"),
        ("network_efficiency", "link_gb_per_s"),
    ):
        if field in machine.measured:
            changes[name] = 1.0
    if machine.attention_tflops is not None:
        changes["attention_efficiency"] = machine.attention_tflops / machine.matrix_tflops
    if machine.latency_us is not None:
        changes["latency_us"] = machine.latency_us
    return replace(constants, **changes)


def collective_seconds(
    kind: str, num_bytes: int, group: GroupShape, machine: Machine, constants: Constants
) -> float:
    """Return the seconds of one collective or message alone on the machine.

    A measured group of the same shape gives latency and bandwidth as they are. One of another shape
    gives them times the ratio by which the formulas of the module's docstring tell the two apart.

    Args:
        kind: As in ``Collective``.
        num_bytes: As in ``Collective``.
        group: Its group.
        machine: The machine.
        constants: Of the software.

    Raises:
        ConfigError: The group spans nodes, but the profile has no network.
    """
    if machine.network_gb_per_s is None and group.nodes > 1:
        raise ConfigError(
            f"{machine.name}: network.gb_per_s: absent, but {group.size} ranks need several nodes"
        )
    kind = "send" if kind == "receive" else kind
    per_byte = _seconds_per_byte(kind, group, machine, constants)
    measured = machine.group_like(kind, group)
    if measured is None:
        return _depth(group) * constants.latency_us * 1e-6 + num_bytes * per_byte
    line, known = measured.lines[kind], measured.shape
    per_byte /= _seconds_per_byte(kind, known, machine, constants) * line.bandwidth
    return _depth(group) / _depth(known) * line.latency + num_bytes * per_byte


def _depth(group: GroupShape) -> float:
    return 1 + math.log2(group.nodes)


def _seconds_per_byte(
    kind: str, group: GroupShape, machine: Machine, constants: Constants
) -> float:
    n, g = group.size, group.per_node
    link = machine.link_gb_per_s * 1e9 * constants.network_efficiency
    share = (machine.network_gb_per_s or 0.0) / machine.devices_per_node
    own_adapter = share * 1e9 * constants.network_efficiency
    inside = group.nodes == 1
    if kind == "send":
        return 1 / (link if inside else own_adapter)
    if kind == "all-to-all":
        within, between = (g - 1) / n / link, (n - g) / n
        return within if inside else max(within, between / own_adapter)
    rate = link if inside else min(link, g * own_adapter)
    passes = 2 if kind == "all-reduce" else 1
    return passes * (1 if kind in ("broadcast", "reduce") else (n - 1) / n) / rate


@dataclass
class WorkSeconds:
    """Seconds of a rank's computation by what bounds it."""

    matrices: float = 0.0
    attention: float = 0.0
    memory: float = 0.0

    @property
    def total(self) -> float:
        """Seconds of all three."""
        return self.matrices + self.attention + self.memory


def work_seconds(work: Work, machine: Machine, constants: Constants) -> WorkSeconds:
    """Return the seconds that a rank's work takes on its device."""
    peak = machine.matrix_tflops * 1e12
    bandwidth = machine.memory_tb_per_s * 1e12 * constants.memory_efficiency
    rate = peak * constants.matrix_efficiency
    return WorkSeconds(
        matrices=sum(
            times * max(product.flops / rate, product.num_bytes / bandwidth)
            for product, times in work.products.items()
        ),
        attention=work.attention_flops / (peak * constants.attention_efficiency),
        memory=work.memory_bytes / bandwidth,
    )


def traffic_seconds(
    traffic: Mapping[Collective, int],
    groups: Mapping[str, GroupShape],
    machine: Machine,
    constants: Constants,
) -> dict[str, float]:
    """Return the seconds of all collectives by axis, one after the other."""
    found: dict[str, float] = {}
    for each, times in traffic.items():
        seconds = collective_seconds(
            each.kind, each.num_bytes, groups[each.axis], machine, constants
        )
        found[each.axis] = found.get(each.axis, 0.0) + times * seconds
    return found


def exposed(computation: float, traffic: float, overlap: float) -> float:
    """Return the seconds of traffic that computation does not hide."""
    return traffic - overlap * min(computation, traffic)


def as_vector(constants: Constants) -> tuple[float, ...]:
    """Return the constants in the order of their fields."""
    return astuple(constants)


def from_vector(values: Iterable[float]) -> Constants:
    """Return the constants from the values of their fields, in order."""
    names = [field.name for field in fields(Constants)]
    return Constants(**dict(zip(names, map(float, values), strict=True)))
