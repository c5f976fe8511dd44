"""What a checkpoint contains, as plain data: files, configuration, tensors and their statistics."""

from __future__ import annotations

import fnmatch
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from mot_megatron.checkpoint.manifest import read_manifest
from mot_megatron.checkpoint.names import CONTENTS, MADE_FROM, STATE_KINDS, WEIGHTS_ONLY
from mot_megatron.config import Config
from mot_megatron.config_files import differing_keys
from mot_megatron.conversion.layout import describe_layout
from mot_megatron.conversion.source import CheckpointSource
from mot_megatron.conversion.tensors import TensorInfo
from mot_megatron.conversion.weights import boxes
from mot_megatron.errors import CheckpointError

_BLOCK_ELEMENTS = 1 << 18
"""Elements of which statistics are computed at a time."""
_LAYER = re.compile(r"layers\.(\d+)\.")
_TOWER = re.compile(r"\.(?:towers\.(\d+)|shared)\.")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_RANK_FILE = re.compile(r"__(\d+)_\d+\.distcp")


@dataclass(frozen=True)
class TensorName:
    """The parts of a tensor's name."""

    kind: str
    """weight, exp_avg or exp_avg_sq."""
    component: str
    """Name without kind, layer, tower and expert."""
    layer: int | None
    """None outside the layers."""
    tower: int | None
    """None for a tensor that all towers share."""
    expert: int | None

    @classmethod
    def parse(cls, name: str) -> TensorName:
        """Split a name such as ``weight/layers.0.feed_forward.towers.1.down.linear.weight``."""
        kind, _, rest = name.partition("/")
        layer, tower, expert = _LAYER.match(rest), _TOWER.search(rest), _EXPERT.search(rest)
        component = _EXPERT.sub(".experts.", _TOWER.sub(".", _LAYER.sub("", rest, count=1)))
        return cls(kind, component, *(_number(found) for found in (layer, tower, expert)))


def _number(found: re.Match[str] | None) -> int | None:
    return int(found[1]) if found and found[1] else None


def describe(source: CheckpointSource, config: Config | None = None) -> dict[str, Any]:
    """Return what a verified checkpoint contains, as a JSON document without values of tensors.

    Args:
        source: The checkpoint.
        config: Configuration to compare with the checkpoint's.

    Raises:
        CheckpointError: Its manifest or metadata cannot be read.
        ConfigError: This version of the program does not accept its configuration.
    """
    checkpoint, metadata = source.checkpoint, source.metadata
    files = read_manifest(checkpoint.path).files
    ranks = [int(found[1]) for name in files if (found := _RANK_FILE.fullmatch(name))]
    document = {
        "path": str(checkpoint.path),
        "contents": _contents(source),
        "verified": True,
        "files": len(files),
        "bytes": checkpoint.num_bytes,
        "step": checkpoint.step,
        "progress": _numbers(metadata.get("progress")),
        "optimizer_steps": metadata.get("optimizer_steps"),
        "data": data if isinstance(data := metadata.get("data"), dict) else {},
        "made_from": _made_from(metadata),
        "layout": describe_layout(source.config),
        "ranks_with_files": len(set(ranks)),
        "tower_names": list(source.config.model.tower_names),
        "config": _tree(source.config),
        "tensors": {
            name: {
                "shape": list(info.shape),
                "dtype": dtype_name(info.dtype),
                "bytes": info.num_bytes,
            }
            for name, info in source.infos.items()
        },
    }
    if config is not None:
        document["config_differences"] = config_differences(source.config, config)
    return document


def config_differences(one: Config, other: Config) -> dict[str, dict[str, Any]]:
    """Return the keys in which configurations differ, with both values; keys of run excepted."""
    differing = differing_keys(_tree(one), _tree(other))
    return {key: {"first": ours, "second": theirs} for key, (ours, theirs) in differing.items()}


@dataclass
class Component:
    """The tensors of one component that have the same shape and dtype, whatever their place."""

    kinds: Counter[str] = field(default_factory=Counter)
    """Number of tensors by kind: weight, exp_avg, exp_avg_sq."""
    num_bytes: int = 0


def by_component(infos: Mapping[str, TensorInfo]) -> dict[tuple[str, str], Component]:
    """Group tensors by component, and shape with dtype; layers, towers and experts merge."""
    groups: dict[tuple[str, str], Component] = {}
    for name, info in infos.items():
        parts = TensorName.parse(name)
        shape = " x ".join(map(str, info.shape)) or "scalar"
        key = parts.component, f"{shape} {dtype_name(info.dtype)}"
        group = groups.setdefault(key, Component())
        group.kinds[parts.kind] += 1
        group.num_bytes += info.num_bytes
    return groups


def parameters_by_place(infos: Mapping[str, TensorInfo]) -> dict[int | None, Counter[int | None]]:
    """Count elements of weights per layer (None: outside the layers) and tower (None: shared)."""
    places: dict[int | None, Counter[int | None]] = {}
    for name, info in infos.items():
        parts = TensorName.parse(name)
        if parts.kind == STATE_KINDS[0]:
            places.setdefault(parts.layer, Counter())[parts.tower] += math.prod(info.shape)
    return places


def statistics(source: CheckpointSource, pattern: str) -> dict[str, dict[str, float | int]]:
    """Return statistics of the tensors whose names match a shell pattern.

    Elements that are not finite are counted and otherwise ignored; means and deviations are
    computed in fp64.

    Raises:
        CheckpointError: No tensor matches, or a tensor cannot be read.
    """
    names = [name for name in source.infos if fnmatch.fnmatchcase(name, pattern)]
    if not names:
        raise CheckpointError(f"{source.checkpoint.path} has no tensor named like {pattern}")
    return {name: _statistics(source, name) for name in names}


def compare(one: CheckpointSource, other: CheckpointSource) -> dict[str, Any]:
    """Return in which tensors two checkpoints differ, and by how much.

    Floating-point tensors of different dtypes are compared by value.
    """
    ours, theirs = one.infos, other.infos
    common = [name for name in ours if name in theirs]
    shapes = {
        name: f"{list(ours[name].shape)} and {list(theirs[name].shape)}"
        for name in common
        if ours[name].shape != theirs[name].shape
    }
    differing = {
        name: difference
        for name in common
        if name not in shapes and (difference := _difference(one, other, name)) is not None
    }
    return {
        "first": str(one.checkpoint.path),
        "second": str(other.checkpoint.path),
        "steps": [one.checkpoint.step, other.checkpoint.step],
        "tensors_in_both": len(common),
        "only_in_first": [name for name in ours if name not in theirs],
        "only_in_second": [name for name in theirs if name not in ours],
        "shapes_differ": shapes,
        "dtypes_differ": {
            name: f"{dtype_name(ours[name].dtype)} and {dtype_name(theirs[name].dtype)}"
            for name in common
            if ours[name].dtype != theirs[name].dtype
        },
        "values_differ": differing,
        "config_differences": config_differences(one.config, other.config),
        "metadata_equal": one.metadata == other.metadata,
    }


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype, such as float32."""
    return str(dtype).removeprefix("torch.")


def _contents(source: CheckpointSource) -> str:
    if source.metadata.get(CONTENTS) == WEIGHTS_ONLY:
        return "weights only"
    kinds = {name.partition("/")[0] for name in source.infos}
    return "training state" if set(STATE_KINDS) <= kinds else "tensors of another program"


def _made_from(metadata: Mapping[str, Any]) -> list[str]:
    """Return the checkpoints from which an earlier command made this one."""
    upcycled = metadata.get("upcycled_from")
    sources = metadata.get(MADE_FROM, [upcycled] if upcycled else [])
    return [str(source.get("checkpoint")) for source in sources if isinstance(source, dict)]


def _numbers(entries: Any) -> dict[str, float]:
    """Return the entries of a dictionary that are numbers; metadata may contain anything."""
    found = entries.items() if isinstance(entries, dict) else ()
    return {str(key): value for key, value in found if isinstance(value, int | float)}


def _tree(config: Config) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude_none=True)


def _statistics(source: CheckpointSource, name: str) -> dict[str, float | int]:
    low, high, total, squares, finite, zeros = math.inf, -math.inf, 0.0, 0.0, 0, 0
    info = source.infos[name]
    for offsets, sizes in boxes(info.shape, _BLOCK_ELEMENTS):
        values = source.read_box(name, offsets, sizes).double()
        values = values[torch.isfinite(values)]
        if values.numel():
            low, high = min(low, float(values.min())), max(high, float(values.max()))
        total += float(values.sum())
        squares += float(values.square().sum())
        finite += values.numel()
        zeros += int((values == 0).sum())
    mean = total / finite if finite else math.nan
    spread = math.sqrt(max(0.0, squares / finite - mean**2)) if finite else math.nan
    elements = math.prod(info.shape)
    return {
        "elements": elements,
        "min": low if finite else math.nan,
        "max": high if finite else math.nan,
        "mean": mean,
        "std": spread,
        "zeros": zeros,
        "not_finite": elements - finite,
    }


def _difference(
    one: CheckpointSource, other: CheckpointSource, name: str
) -> dict[str, float | int] | None:
    """Return how much a tensor differs, or None if all its values are equal."""
    largest, squares, reference, elements = 0.0, 0.0, 0.0, 0
    for offsets, sizes in boxes(one.infos[name].shape, _BLOCK_ELEMENTS):
        ours = one.read_box(name, offsets, sizes)
        theirs = other.read_box(name, offsets, sizes)
        if ours.dtype == theirs.dtype and torch.equal(ours, theirs):
            reference += float(ours.double().square().sum())
            continue
        ours, theirs = ours.double(), theirs.double()
        unequal = (ours != theirs) & ~(ours.isnan() & theirs.isnan())
        elements += int(unequal.sum())
        gap = (theirs - ours)[unequal].abs()
        if gap.numel():
            largest = max(largest, float(gap.nan_to_num(math.inf).max()))
        squares += float(gap.square().sum())
        reference += float(ours.square().sum())
    if not elements:
        return None
    relative = math.sqrt(squares / reference) if reference > 0 else math.inf
    return {"elements": elements, "largest": largest, "relative": relative}
