"""Anchor of a forecast: a measured step of the same model, by which all forecasts are scaled."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mot_megatron.config import Config
from mot_megatron.config_files import differing_keys
from mot_megatron.errors import ConfigError
from mot_megatron.planning.arms import MODEL
from mot_megatron.scaling.measure import DESCRIPTION_FILE, read_records
from mot_megatron.scaling.report import rows_of


@dataclass(frozen=True)
class Anchor:
    """The measurement of the model on the fewest ranks."""

    config: Config
    """Configuration that was measured."""
    world_size: int
    seconds: float
    """Seconds of its step, MEASURED."""


def read_anchor(directory: Path, config: Config) -> Anchor:
    """Return the anchor in the folder of a measurement.

    Args:
        directory: Folder that ``mot benchmark scaling measure`` has written.
        config: Resolved configuration to forecast, of the same model; layout and batch may differ.

    Raises:
        DataError: The folder has no measurement.
        ConfigError: Another model was measured.
    """
    description, records = read_records(directory)
    row = next(row for row in rows_of(description, records) if row.arm == MODEL)
    measured = description["arms"][MODEL][str(row.world_size)]
    wanted = config.model_dump(mode="json")
    differences = differing_keys(_identity(measured), _identity(wanted))
    if differences:
        key, (theirs, ours) = next(iter(differences.items()))
        raise ConfigError(
            f"{directory / DESCRIPTION_FILE}: another model was measured: {key} was {theirs!r} and"
            f" is {ours!r}"
        )
    return Anchor(
        Config.model_validate({**measured, "run": wanted["run"]}),
        row.world_size,
        row.step_seconds.median,
    )


def _identity(values: dict[str, Any]) -> dict[str, Any]:
    """Return what a measurement and a forecast must have in common."""
    return {
        "model": values["model"],
        "data": {"seq_length": values["data"]["seq_length"]},
        "training": {"precision": values["training"]["precision"]},
    }
