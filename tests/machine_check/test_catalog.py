"""All checks of the list can run: functions, arguments, configurations and layouts are legal."""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path

import pytest

from mot_megatron.cli.configs import config_directory
from mot_megatron.config_files import load_config
from mot_megatron.machine_check.catalog import all_checks
from mot_megatron.machine_check.checks import Check
from mot_megatron.machine_check.parity import MODELS, REFERENCE_FILE, small_config, steps_of
from mot_megatron.rules import check_world_size

CHECKS = {device: all_checks(device) for device in ("cpu", "cuda")}
EVERY = [pytest.param(c, d, id=f"{d}-{c.name}") for d, checks in CHECKS.items() for c in checks]


@pytest.mark.parametrize(("check", "device"), EVERY)
def test_functions_take_their_settings(check: Check, device: str) -> None:
    module, _, name = check.function.partition(":")
    inspect.signature(getattr(import_module(module), name)).bind(None, **check.settings)
    assert check.device in (None, device)
    assert check.settings.get("world_size", 1) == check.num_devices


@pytest.mark.parametrize(("check", "device"), EVERY)
def test_configurations_are_legal(check: Check, device: str) -> None:
    del device
    settings = check.settings
    added = [*settings.get("base", ()), *settings.get("overrides", ())]
    if "config" in settings:
        config = load_config(config_directory() / settings["config"], added)
    elif "model" in settings:
        added.append(f"training.train_steps={settings['steps']}")
        config = small_config(Path("corpus"), settings["model"], added)
        assert settings["steps"] <= steps_of(settings["model"])
    else:
        return
    check_world_size(config, check.num_devices)


@pytest.mark.parametrize("device", CHECKS)
def test_names_are_unique_and_a_short_limit_has_every_part_of_the_plan(device: str) -> None:
    names = [check.name for check in CHECKS[device]]
    assert len(set(names)) == len(names)
    first = names[: next(n for n, name in enumerate(names) if name.startswith("branches/"))]
    parts = {name.partition("/")[0] for name in first}
    assert parts == {"machine", "probes", "links", "parity", "speed"}
    quick = [check for check in CHECKS[device] if check.quick and check.num_devices == 1]
    assert sum(check.seconds for check in quick) <= 13 * 60


def test_every_model_has_a_reference() -> None:
    assert REFERENCE_FILE.exists()
    used = {
        c.settings["model"] for checks in CHECKS.values() for c in checks if "model" in c.settings
    }
    assert used == set(MODELS)
