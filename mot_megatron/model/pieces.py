"""Assign layers to pipeline stages: one piece of the model per stage, or several, interleaved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mot_megatron.config import Config


@dataclass(frozen=True)
class Piece:
    """Consecutive layers; the first piece has the embedding too, the last one the head."""

    layers: range
    first: bool
    last: bool


def all_pieces(config: Config) -> list[Piece]:
    """List the pieces of the whole model in order: ``pipeline_layers``, or pieces of equal size."""
    parallel = config.parallel
    count = parallel.pipeline_model_parallel_size * (
        parallel.virtual_pipeline_model_parallel_size or 1
    )
    sizes: Sequence[int] = parallel.pipeline_layers or [config.model.num_layers // count] * count
    starts = [sum(sizes[:index]) for index in range(count)]
    return [
        Piece(range(start, start + size), first=index == 0, last=index == count - 1)
        for index, (start, size) in enumerate(zip(starts, sizes, strict=True))
    ]


def pieces_of_stage(config: Config, stage: int) -> tuple[Piece, ...]:
    """List the pieces of a stage, assigned round-robin."""
    return tuple(all_pieces(config)[stage :: config.parallel.pipeline_model_parallel_size])
