"""The weights of a checkpoint alone, in a dtype of choice, or the mean of several checkpoints'."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mot_megatron.checkpoint.find import finished_checkpoints
from mot_megatron.checkpoint.names import (
    CONTENTS,
    MADE_FROM,
    WEIGHT_PREFIX,
    WEIGHTS_ONLY,
    checkpoint_directory,
)
from mot_megatron.conversion.source import CheckpointSource
from mot_megatron.conversion.tensors import OutputTensor, TensorInfo
from mot_megatron.errors import CheckpointError

_BLOCK_ELEMENTS = 1 << 22
"""Elements that are summed at a time, so that fp64 sums need little memory."""

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""First index and length in each dimension."""


def newest_sources(path: Path, number: int, threads: int = 1) -> list[CheckpointSource]:
    """Open the last ``number`` verified checkpoints, newest first; damaged ones are passed over.

    Args:
        path: Folder of a run or of its checkpoints.
        number: At least 1; with 1, ``path`` may be a single checkpoint.
        threads: Number of files that are verified at a time.

    Raises:
        CheckpointError: There are fewer.
    """
    if number == 1:
        return [CheckpointSource(path, threads)]
    inside = checkpoint_directory(path)
    directory = inside if inside.is_dir() else path
    found: list[CheckpointSource] = []
    problems: list[str] = []
    for _, folder in finished_checkpoints(directory):
        try:
            found.append(CheckpointSource(folder, threads))
        except CheckpointError as error:
            problems.append(str(error))
        if len(found) == number:
            return found
    damaged = f" ({'; '.join(problems)})" if problems else ""
    raise CheckpointError(
        f"{directory} has {len(found)} usable checkpoints{damaged}; needed for the mean: {number}"
    )


def weight_outputs(
    sources: Sequence[CheckpointSource], dtype: torch.dtype | None
) -> list[OutputTensor]:
    """Return the weights to write: of one checkpoint, or the mean of several.

    Args:
        sources: Checkpoints of the same model.
        dtype: Floating-point dtype of the weights; None for that of each weight.

    Raises:
        CheckpointError: A checkpoint has no weights, or they are those of another model.
    """
    first, *others = sources
    infos = {n: info for n, info in first.infos.items() if n.startswith(WEIGHT_PREFIX)}
    if not infos:
        raise CheckpointError(f"{first.checkpoint.path} has no tensor named {WEIGHT_PREFIX}...")
    for other in others:
        theirs = {n: info.shape for n, info in other.infos.items() if n.startswith(WEIGHT_PREFIX)}
        for name in dict.fromkeys((*infos, *theirs)):
            ours = infos[name].shape if name in infos else None
            if ours != theirs.get(name):
                raise CheckpointError(
                    f"{other.checkpoint.path} is a checkpoint of another model than"
                    f" {first.checkpoint.path}: {name} is {theirs.get(name)} and {ours}"
                )
    return [
        _output(sources, name, TensorInfo(i.shape, dtype or i.dtype)) for name, i in infos.items()
    ]


def left_out(source: CheckpointSource) -> dict[str, int]:
    """Count the tensors that ``weight_outputs`` leaves out, by kind: the part before the slash."""
    kinds = sorted(n.partition("/")[0] for n in source.infos if not n.startswith(WEIGHT_PREFIX))
    return {kind: len(list(names)) for kind, names in itertools.groupby(kinds)}


def weights_metadata(sources: Sequence[CheckpointSource]) -> dict[str, Any]:
    """Return the metadata of a checkpoint of weights: what the newest source says, and the origin.

    Args:
        sources: Checkpoints, newest first.
    """
    metadata = dict(sources[0].metadata)
    metadata.pop("optimizer_steps", None)
    origin = [{"checkpoint": str(s.checkpoint.path), "step": s.checkpoint.step} for s in sources]
    return {**metadata, CONTENTS: WEIGHTS_ONLY, MADE_FROM: origin}


def boxes(shape: Sequence[int], most: int) -> Iterator[Box]:
    """Yield boxes that cover a tensor, each of at most ``most`` elements, or of one row."""
    if not shape or torch.Size(shape).numel() <= most:
        yield (0,) * len(shape), tuple(shape)
        return
    inner = torch.Size(shape[1:]).numel()
    if inner > most and len(shape) > 1:
        for index in range(shape[0]):
            for offsets, sizes in boxes(shape[1:], most):
                yield (index, *offsets), (1, *sizes)
        return
    rows = max(1, most // inner)
    for start in range(0, shape[0], rows):
        size = min(rows, shape[0] - start)
        yield (start, *(0 for _ in shape[1:])), (size, *shape[1:])


def _output(sources: Sequence[CheckpointSource], name: str, info: TensorInfo) -> OutputTensor:
    def produce() -> torch.Tensor:
        values = torch.empty(info.shape, dtype=info.dtype)
        for offsets, sizes in boxes(info.shape, _BLOCK_ELEMENTS):
            total = torch.zeros(sizes, dtype=torch.float64)
            for source in sources:
                total += source.read_box(name, offsets, sizes)
            part = values
            for dimension, (start, length) in enumerate(zip(offsets, sizes, strict=True)):
                part = part.narrow(dimension, start, length)
            part.copy_(total.div_(len(sources)))
        return values

    return OutputTensor(name, info, (name,), produce)
