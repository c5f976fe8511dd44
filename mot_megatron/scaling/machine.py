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
    "bf16_tflops": ("device", "bf16_tflops"),
    "memory_gb": ("device", "memory_gb"),
    "memory_tb_per_s": ("device", "memory_tb_per_s"),
    "devices_per_node": ("node", "devices"),
    "link_gb_per_s": ("node", "link_gb_per_s"),
    "network_gb_per_s": ("network", "gb_per_s"),
}
"""Field of ``Machine``: table and key of the file."""


@dataclass(frozen=True)
class Machine:
    """Nodes of equal devices, each connected to a network."""

    name: str
    bf16_tflops: float
    """Peak of dense matrix products of one device, in 10^12 FLOPs per second."""
    memory_gb: float
    """Memory of one device, in 10^9 bytes."""
    memory_tb_per_s: float
    """Bandwidth of a device's memory, in 10^12 bytes per second."""
    devices_per_node: float
    link_gb_per_s: float
    """What one device can send within its node, in 10^9 bytes per second and direction."""
    network_gb_per_s: float
    """What one node can send to others, in 10^9 bytes per second and direction."""
    stamps: tuple[str, ...] = (DATA_SHEET,)
    """Where the numbers come from."""


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
    entries = {field: _entry(path, tables, *place) for field, place in _NUMBERS.items()}
    if tables := {key: table for key, table in tables.items() if table}:
        key, table = next(iter(tables.items()))
        inner = f".{next(iter(table))}" if isinstance(table, dict) else ""
        raise ConfigError(f"{path}: {key}{inner}: unknown key")
    numbers = {field: entry["value"] for field, entry in entries.items()}
    stamps = tuple(sorted({entry["stamp"] for entry in entries.values()}))
    assert {*numbers, "name", "stamps"} == {field.name for field in fields(Machine)}
    return Machine(name, **numbers, stamps=stamps)


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
