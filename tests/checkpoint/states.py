"""A small state with every kind of tensor that checkpoints store, and helpers to save and load."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch

from mot_megatron.checkpoint import CheckpointInfo, NamedTensor, load_checkpoint, save_checkpoint
from mot_megatron.checkpoint.manifest import Manifest, read_manifest, record_of, write_manifest
from mot_megatron.checkpoint.save import Keep
from mot_megatron.model.sharding import ParameterSharding
from mot_megatron.parallel.groups import ProcessGroups

SHARDINGS = {
    "model/norm": (ParameterSharding((5,)), torch.float32),
    "model/column": (ParameterSharding((4, 6), 0), torch.float32),
    "model/row": (ParameterSharding((6, 4), 1), torch.bfloat16),
    "model/swiglu": (ParameterSharding((2, 4, 3), 1), torch.float64),
    "exp_avg/column": (ParameterSharding((4, 6), 0), torch.float32),
    "count": (ParameterSharding(()), torch.int64),
}


def global_values(seed: int) -> dict[str, torch.Tensor]:
    """Return the whole tensors, a function of ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(sharding.global_shape, generator=generator) * 100).to(dtype)
        for name, (sharding, dtype) in SHARDINGS.items()
    }


def local_part(name: str, value: torch.Tensor, groups: ProcessGroups | None) -> torch.Tensor:
    """Return this rank's part of ``value``; that of SwiGLU has the flat shape of its parameter."""
    dim = SHARDINGS[name][0].shard_dim
    if groups is not None and dim is not None:
        value = value.chunk(groups.tensor_size, dim)[groups.tensor_rank]
    if name == "model/swiglu":
        value = value.flatten(0, 1)
    return value.contiguous().clone()


def state(seed: int, groups: ProcessGroups | None = None) -> list[NamedTensor]:
    """Return this rank's tensors."""
    return [
        NamedTensor(name, local_part(name, value, groups), SHARDINGS[name][0])
        for name, value in global_values(seed).items()
    ]


def save(
    directory: Path,
    step: int,
    keep: int = 10,
    seed: int | None = None,
    damaged: Collection[Path] = (),
    every_steps: int = 0,
) -> CheckpointInfo:
    """Save a state from this process only; its seed is ``step`` by default."""
    return save_checkpoint(
        directory,
        step,
        state(step if seed is None else seed),
        metadata={"step": step},
        config_text="[run]\n",
        groups=None,
        keep=Keep(keep, every_steps, damaged),
    )


def differing_after_load(
    checkpoint: CheckpointInfo, seed: int, groups: ProcessGroups | None = None
) -> list[str]:
    """Load over other values and return the names of tensors that then differ from the seed's."""
    tensors = state(seed + 1000, groups)
    load_checkpoint(checkpoint, tensors, groups)
    wanted = {named.name: named.tensor for named in state(seed, groups)}
    return [named.name for named in tensors if not torch.equal(named.tensor, wanted[named.name])]


def reseal(path: Path) -> None:
    """Rewrite the manifest so that tampered files pass verification, as an attacker would."""
    files = {name: record_of(path / name) for name in list_files(path)}
    step = int(path.name.removeprefix("step_"))
    write_manifest(path, Manifest(step=step, num_tensors=len(SHARDINGS), files=files))
    read_manifest(path)


def list_files(path: Path) -> list[str]:
    """List the files of a checkpoint except the manifest."""
    return sorted(file.name for file in path.iterdir() if file.name != "manifest.json")
