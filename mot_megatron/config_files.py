"""Load the configuration from TOML files and ``section.key=value`` overrides, and check it.

Errors name the file with the offending value, or all files if only their combination is illegal.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from mot_megatron.config import Config
from mot_megatron.config_model import ModalityConfig, ModelConfig, TowerConfig
from mot_megatron.config_section import Section
from mot_megatron.errors import ConfigError, Location, first_problem
from mot_megatron.files import read_regular_file
from mot_megatron.rules import check


def load_config(
    paths: Path | Sequence[Path],
    overrides: list[str] | None = None,
    defaults: tuple[str, Mapping[str, Any]] | None = None,
) -> Config:
    """Load TOML files, apply overrides and check the merged configuration.

    Tables of several files are merged; any other value, including an array, replaces the value from
    earlier files. An override is ``section.key=value``, or ``-section.key`` to remove a key, which
    then has its default.

    Args:
        paths: The files.
        overrides: See above.
        defaults: Where further values are from, and these values, as a parsed file; the files
            override them.

    Raises:
        ConfigError: One line with the file, the key, its value and what is allowed. It names all
            files if no single one has the illegal value.
    """
    files = [paths] if isinstance(paths, Path) else paths
    parsed = [(str(path), _parse(_read(path), str(path))) for path in files]
    return _build([*([(defaults[0], dict(defaults[1]))] if defaults else []), *parsed], overrides)


def parse_config(text: str, source: str, overrides: list[str] | None = None) -> Config:
    """Parse and check TOML text as ``load_config`` does; ``source`` names it in errors."""
    return _build([(source, _parse(text, source))], overrides)


_Tree = dict[str, Any]
"""A parsed TOML file, or one of its tables."""


def _read(path: Path) -> str:
    try:
        # Some editors begin a file with a byte order mark.
        return read_regular_file(path).decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: cannot be read: not UTF-8 text") from error


def _parse(text: str, source: str) -> _Tree:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source}: not valid TOML: {error}") from error


def _build(files: Sequence[tuple[str, _Tree]], overrides: list[str] | None) -> Config:
    merged: _Tree = {}
    for _, tree in files:
        merged = _merge(merged, tree)
    for override in overrides or []:
        _apply_override(merged, override)
    everything = " + ".join(source for source, _ in files)
    try:
        config = Config.model_validate(merged)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        named = _source_of(problem["loc"], problem["input"], files) or everything
        raise ConfigError(f"{named}: {first_problem(error, _keys_at)}") from error
    check(config, everything)
    return config


def for_world_size(config: Config, world_size: int) -> Config:
    """Return the configuration with the values of ``scaling.layouts`` for a number of ranks.

    Raises:
        ConfigError: The values are illegal.
    """
    changes = config.scaling.layouts.get(world_size)
    if not changes:
        return config
    source = f"scaling.layouts.{world_size}"
    tree = _merge(config.model_dump(mode="json", exclude_none=True), changes)
    try:
        changed = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{source}: {first_problem(error, _keys_at)}") from error
    check(changed, source)
    return changed


def as_arguments(override: str) -> tuple[str, str]:
    """Return the two words of a command line that stand for an override."""
    return ("--unset", override[1:]) if override.startswith("-") else ("--set", override)


def differing_keys(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the dotted keys in which two configuration trees differ, with both values.

    The value of an absent key is None. Keys of ``run`` are ignored.
    """
    ours, theirs = (
        {key: value for key, value in _flatten(tree) if not key.startswith("run.")}
        for tree in (one, other)
    )
    return {
        key: (ours.get(key), theirs.get(key))
        for key in dict.fromkeys((*ours, *theirs))
        if ours.get(key) != theirs.get(key)
    }


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _merge(base: _Tree, tree: _Tree) -> _Tree:
    """Return a copy of ``base`` with the values of ``tree`` merged in."""
    merged = dict(base)
    for key, value in tree.items():
        old = merged.get(key)
        if isinstance(value, dict):
            value = _merge(old if isinstance(old, dict) else {}, value)
        merged[key] = value
    return merged


def _source_of(
    location: Sequence[int | str], value: Any, files: Sequence[tuple[str, _Tree]]
) -> str | None:
    """Return the last file with ``value`` at ``location``; None if no single file has it."""
    for source, tree in reversed(files):
        found: Any = tree
        for part in location:
            if isinstance(found, list) and isinstance(part, int):
                found = found[part] if part < len(found) else None
            else:
                found = found.get(part) if isinstance(found, dict) else None
        if found is not None and found == value:
            return source
    return None


def _apply_override(tree: _Tree, override: str) -> None:
    if override.startswith("-"):
        _remove_key(tree, override[1:])
        return
    key, separator, value = override.partition("=")
    path = key.strip().split(".")
    if not separator or not all(path):
        raise ConfigError(f"--set {override}: expected section.key=value")
    try:
        parsed = tomllib.loads(f"value = {value.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        # Take a bare word as a string, so that it needs no second pair of quotes in a shell.
        parsed = value.strip()
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"--set {override}: {part} is a value, not a section")
    tree[path[-1]] = parsed


def _remove_key(tree: _Tree, key: str) -> None:
    """Remove a key that is set."""
    *sections, last = key.strip().split(".")
    if not sections or not last:
        raise ConfigError(f"--unset {key}: expected section.key")
    for part in sections:
        tree = tree.get(part, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"--unset {key}: {part} is a value, not a section")
    if last not in tree:
        known = ", ".join(sorted(tree)) or "none"
        raise ConfigError(f"--unset {key}: it is not set; set here: {known}")
    del tree[last]


def _keys_at(location: Location) -> Iterable[str]:
    return _section_at(location).model_fields


_SECTIONS_BY_NAME: dict[str, type[Section]] = {"modalities": ModalityConfig, "towers": TowerConfig}


def _section_at(location: Location) -> type[Section]:
    section: type[Section] = Config
    named = False
    for part in location:
        if isinstance(part, int):  # the place in an array of tables
            continue
        if section is ModelConfig and part in _SECTIONS_BY_NAME:
            section = _SECTIONS_BY_NAME[str(part)]
            named = True
            continue
        if named:  # the name of a modality or tower
            named = False
            continue
        # An optional section is a union with None, and an array of sections is a tuple.
        annotation: Any = section.model_fields[str(part)].annotation
        section = next(kind for kind in get_args(annotation) or (annotation,) if kind)
        assert issubclass(section, Section)
    return section
