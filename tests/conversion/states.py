"""Small checkpoints with random tensors, written without building a model."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from mot_megatron.checkpoint import CheckpointInfo, NamedTensor, save_checkpoint
from mot_megatron.checkpoint.manifest import MANIFEST_NAME, read_manifest
from mot_megatron.checkpoint.names import STATE_KINDS
from mot_megatron.checkpoint.storage import INDEX_NAME, read_index
from mot_megatron.config import Config, ParallelConfig
from mot_megatron.conversion.layout import Layout, layout_config
from mot_megatron.conversion.reshard import reshard
from mot_megatron.conversion.source import CheckpointSource
from mot_megatron.conversion.tensors import TensorInfo
from mot_megatron.model.inventory import held_parameters, is_frozen
from mot_megatron.model.sharding import ParameterSharding, name_of_expert
from tests.cli.console import only_error
from tests.model.small_models import small_config

THREE = {"text": "text", "image": "image", "speech": "speech"}
EXPERTS = (
    "model.towers.text.experts={num_moe_experts=4,causal_router=true}",
    "model.towers.speech.experts={num_moe_experts=2,routing='topk'}",
)
TP2, PP2, MP2, EP2 = (
    f"parallel.{axis}_parallel_size=2"
    for axis in ("tensor_model", "pipeline_model", "modality", "expert_model")
)
SP = "parallel.sequence_parallel=true"
VPP2 = "parallel.virtual_pipeline_model_parallel_size=2"
FOUR_LAYERS = "model.num_layers=4"
TIED = "model.untie_embeddings_and_output_weights=false"
BATCH = "training.global_batch_size=8"
METADATA = {
    "progress": {"steps": 7, "seconds": 3.5, "tokens": 4321},
    "optimizer_steps": 7,
    "data": {"epoch": 1, "next_sequence": 5},
}


def config_of(*overrides: str) -> Config:
    return small_config(THREE, BATCH, *overrides)


def kinds_of(config: Config, name: str) -> tuple[str, ...]:
    """Return the kinds of tensors that a checkpoint has of a parameter."""
    return STATE_KINDS[:1] if is_frozen(config.model, name) else STATE_KINDS


def shapes_of(config: Config) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter as checkpoints name it, one per expert."""
    alone = config.model_copy(update={"parallel": ParallelConfig()})
    shapes = {}
    for parameter in held_parameters(alone, 0, range(config.model.num_towers)):
        experts = range(parameter.experts)
        for name in [name_of_expert(parameter.name, e) for e in experts] or [parameter.name]:
            shapes[name] = parameter.sharding.global_shape
    return shapes


def infos_of(config: Config) -> dict[str, TensorInfo]:
    return {
        f"{kind}/{name}": TensorInfo(shape, torch.float32)
        for name, shape in shapes_of(config).items()
        for kind in kinds_of(config, name)
    }


def values_of(config: Config, step: int = 7) -> dict[str, torch.Tensor]:
    """Return random tensors, a function of their names and of the step."""
    values = {}
    for name, info in infos_of(config).items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + step)
        values[name] = torch.randn(info.shape, generator=generator)
    return values


def write_source(directory: Path, config: Config, step: int = 7, keep: int = 10) -> CheckpointInfo:
    """Save a checkpoint as a single process does."""
    return save_checkpoint(
        directory,
        step,
        [
            NamedTensor(name, value, ParameterSharding(tuple(value.shape)))
            for name, value in values_of(config, step).items()
        ],
        metadata=METADATA,
        config_text=config.to_toml(),
        groups=None,
        keep=keep,
    )


def resharded(
    source: Path, directory: Path, world_size: int, wanted: Config, workers: int = 1
) -> CheckpointInfo:
    """Reshard the newest checkpoint at ``source``."""
    opened = CheckpointSource(source)
    config, _ = layout_config(opened.config, wanted)
    files = Layout.of(config, world_size).files(opened.infos)
    return reshard(opened, directory, config, files, workers=workers)


def assert_values(path: Path, values: dict[str, torch.Tensor]) -> None:
    """Assert that a checkpoint has exactly these tensors, bitwise."""
    source = CheckpointSource(path)
    assert set(source.infos) == set(values)
    for name, value in values.items():
        assert torch.equal(source.read(name), value), name


def names_in(directory: Path) -> Sequence[str]:
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the only line on standard error besides progress, which a slow machine prints."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    return only_error("\n".join(line for line in lines if "%|" not in line))


def assert_equal_files(one: Path, other: Path) -> None:
    """Assert that two checkpoints have the same files, with the same bytes but for the index.

    Pickle refers to a string object that it has written before, but not to an equal one, so equal
    indices may differ in bytes; and the manifest has the size of the index.
    """
    names = {path.name for path in one.iterdir()}
    assert names == {path.name for path in other.iterdir()}
    for name in names - {INDEX_NAME, MANIFEST_NAME}:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    indices = [read_index(folder) for folder in (one, other)]
    assert indices[0].state_dict_metadata == indices[1].state_dict_metadata
    assert indices[0].storage_data == indices[1].storage_data
    first, second = (read_manifest(folder) for folder in (one, other))
    assert first.files.keys() == second.files.keys()
    assert first.model_copy(update={"files": {}}) == second.model_copy(update={"files": {}})
