"""Profiles of machines: what a data sheet, or a calibration, says of their devices and links."""

from __future__ import annotations

import tomllib
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
    "network_gb_per_s": ("network", "gb_per_s"),
    "attention_tflops": ("device", "attention_tflops"),
    "latency_us": ("network", "latency_us"),
}


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
    measured: frozenset[str] = frozenset()
    """Fields that were measured, by software like that of a forecast; the others are from data
    sheets, of whose rates software reaches a part."""

    @property
    def stamps(self) -> tuple[str, ...]:
        """Where the numbers come from."""
        known = {f.name for f in fields(self)} - {"name", "measured"}
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
    return Machine(name, **numbers, measured=measured)


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
    value = entry["value"]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise ConfigError(f"{place}.value: expected a number above 0, found {value!r}")
    if entry["stamp"] not in _STAMPS:
        raise ConfigError(f"{place}.stamp: expected one of {', '.join(_STAMPS)}")
    return entry
