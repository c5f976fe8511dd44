"""Profiles of machines: what a data sheet, or a calibration, says of their devices and links."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mot_megatron.errors import ConfigError
from mot_megatron.files import read_regular_file

DATA_SHEET, MEASURED = "DATA SHEET", "MEASURED"
_STAMPS = (DATA_SHEET, MEASURED)
_NUMBERS = {
    "matrix_tflops": ("device", "matrix_tflops"),
    "memory_gb": ("device", "memory_gb"),
    "memory_tb_per_s": ("device", "memory_tb_per_s"),
    "devices_per_node": ("node", "devices"),
    "link_gb_per_s": ("node", "link_gb_per_s"),
}
"""Field of ``Machine``: table and key of the file."""
_OPTIONAL = {
    "launch_us": ("device", "launch_us"),
    "network_gb_per_s": ("network", "gb_per_s"),
    "attention_tflops": ("device", "attention_tflops"),
    "latency_us": ("network", "latency_us"),
}


_GROUP_KEYS = {"axes", "size", "per_node", "stamp", "source", "latency_us", "gb_per_s"}


@dataclass(frozen=True)
class GroupShape:
    """A process group as the network sees it."""

    size: int
    per_node: int
    """Ranks of the group on each of its nodes."""

    @property
    def nodes(self) -> int:
        """Nodes that the group spans."""
        return math.ceil(self.size / self.per_node)


def group_shape(ranks: Sequence[int], devices_per_node: int) -> GroupShape:
    """Return the shape of a group of global ranks, which fill nodes in ascending order."""
    nodes = {rank // devices_per_node for rank in ranks}
    return GroupShape(len(ranks), math.ceil(len(ranks) / len(nodes)))


@dataclass(frozen=True)
class Line:
    """Seconds of a collective or message: latency plus bytes over bandwidth."""

    latency: float
    """Seconds."""
    bandwidth: float
    """Bytes of ``ledger.Collective`` per second."""


@dataclass(frozen=True)
class MeasuredGroup:
    """Measured collectives over groups of one shape."""

    axes: str
    """Roles of the groups, or ``message``."""
    shape: GroupShape
    lines: Mapping[str, Line]
    """By kind of collective, as in ``ledger.Collective``; a message is ``send``."""

    def distance(self, shape: GroupShape) -> float:
        """Return how unlike another shape is: the sum of the logarithms of the ratios."""
        own = self.shape
        of_nodes = abs(math.log(own.per_node / shape.per_node))
        return abs(math.log(own.size / shape.size)) + of_nodes


@dataclass(frozen=True)
class Machine:
    """Nodes of equal devices, each connected to a network."""

    name: str
    matrix_tflops: float
    """Dense matrix products of one device in the precision of training, in 10^12 FLOPs per second:
    the peak of a data sheet, or what was measured."""
    memory_gb: float
    """Memory of one device, in 10^9 bytes."""
    memory_tb_per_s: float
    """Bandwidth of a device's memory, in 10^12 bytes per second."""
    devices_per_node: float
    link_gb_per_s: float
    """What one device can send within its node, in 10^9 bytes per second and direction."""
    network_gb_per_s: float | None = None
    """What one node can send to others, in 10^9 bytes per second and direction; None for a single
    node."""
    attention_tflops: float | None = None
    """Attention of one device, in 10^12 FLOPs per second; None if it was not measured."""
    latency_us: float | None = None
    """Microseconds of latency of a collective per node; None if it was not measured."""
    launch_us: float = 5.0
    """Microseconds of the host to start a kernel without CUDA graphs; an assumption, unless it was
    measured."""
    groups: tuple[MeasuredGroup, ...] = ()
    """Collectives that were measured; the others follow from the links."""
    measured: frozenset[str] = frozenset()
    """Fields that were measured, by software like that of a forecast; the others are from data
    sheets, of whose rates software reaches a part."""

    def group_like(self, kind: str, shape: GroupShape) -> MeasuredGroup | None:
        """Return the measured group that is most like a shape; None if none is.

        Groups within a node are never like those of several nodes.
        """
        candidates = [
            group
            for group in self.groups
            if kind in group.lines and (group.shape.nodes == 1) == (shape.nodes == 1)
        ]
        return min(candidates, key=lambda group: group.distance(shape), default=None)

    @property
    def stamps(self) -> tuple[str, ...]:
        """Where the numbers come from."""
        known = {f.name for f in fields(self)} - {"name", "measured", "groups", "launch_us"}
        given = {name for name in known if getattr(self, name) is not None}
        return (DATA_SHEET,) * bool(given - self.measured) + (MEASURED,) * bool(self.measured)


def load_machine(path: Path) -> Machine:
    """Read a profile.

    Raises:
        ConfigError: The file is not a profile, or lacks a number or its source.
    """
    try:
        tables = tomllib.loads(read_regular_file(path).decode("utf-8-sig"))
    except OSError as error:
        known = ", ".join(sorted(found.stem for found in path.parent.glob("*.toml")))
        more = f"; profiles in {path.parent}: {known}" if known else ""
        raise ConfigError(f"{path}: {error.strerror}{more}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    name = tables.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(f"{path}: name: expected the machine's name, found {name!r}")
    groups = tuple(_group(path, entry) for entry in _list(path, tables.pop("groups", [])))
    places = {
        field: place
        for field, place in (_NUMBERS | _OPTIONAL).items()
        if field in _NUMBERS or place[1] in tables.get(place[0], {})
    }
    entries = {field: _entry(path, tables, *place) for field, place in places.items()}
    if tables := {key: table for key, table in tables.items() if table}:
        key, table = next(iter(tables.items()))
        inner = f".{next(iter(table))}" if isinstance(table, dict) else ""
        raise ConfigError(f"{path}: {key}{inner}: unknown key")
    numbers = {field: entry["value"] for field, entry in entries.items()}
    measured = frozenset(field for field, entry in entries.items() if entry["stamp"] == MEASURED)
    return Machine(name, **numbers, groups=groups, measured=measured)


def _list(path: Path, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ConfigError(f"{path}: groups: expected tables [[groups]]")
    return value


def _group(path: Path, entry: Any) -> MeasuredGroup:
    """Read the entry of one measured group."""
    place = f"{path}: groups"
    if not isinstance(entry, dict) or {*entry} != _GROUP_KEYS:
        raise ConfigError(f"{place}: expected the keys {', '.join(sorted(_GROUP_KEYS))}")
    if entry["stamp"] != MEASURED:
        raise ConfigError(f"{place}.stamp: expected {MEASURED}")
    size, per_node = (_number(f"{place}.{key}", entry[key]) for key in ("size", "per_node"))
    latencies, rates = entry["latency_us"], entry["gb_per_s"]
    if not isinstance(rates, dict) or not isinstance(latencies, dict) or {*rates} != {*latencies}:
        raise ConfigError(f"{place}: latency_us and gb_per_s: expected tables with the same keys")
    lines = {
        kind: Line(
            _number(f"{place}.latency_us.{kind}", latencies[kind]) / 1e6,
            1e9 * _number(f"{place}.gb_per_s.{kind}", rates[kind]),
        )
        for kind in rates
    }
    return MeasuredGroup(str(entry["axes"]), GroupShape(int(size), int(per_node)), lines)


def _number(place: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise ConfigError(f"{place}: expected a number above 0, found {value!r}")
    return value


def _entry(path: Path, tables: dict[str, Any], table: str, key: str) -> dict[str, Any]:
    """Take the entry of one number out of ``tables``."""
    place = f"{path}: {table}.{key}"
    section = tables.get(table)
    if not isinstance(section, dict) or key not in section:
        raise ConfigError(f"{place}: absent, but forecasts need it")
    entry = section.pop(key)
    if not isinstance(entry, dict) or {*entry} != {"value", "stamp", "source"}:
        raise ConfigError(
            f'{place}: expected {{ value = NUMBER, stamp = "{DATA_SHEET}", source = "..." }}'
        )
    _number(f"{place}.value", entry["value"])
    if entry["stamp"] not in _STAMPS:
        raise ConfigError(f"{place}.stamp: expected one of {', '.join(_STAMPS)}")
    return entry
