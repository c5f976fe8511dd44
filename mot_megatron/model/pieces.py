"""Which layers a pipeline stage runs: one piece of the model, or several for interleaving."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mot_megatron.config import Config


@dataclass(frozen=True)
class Piece:
    """Consecutive layers, with the embedding before the first and the head behind the last."""

    layers: range
    first: bool
    last: bool


def all_pieces(config: Config) -> list[Piece]:
    """The pieces of the whole model, in its order: the list of the configuration, or equal ones."""
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
    """The pieces of a stage: every so many-th, so that the model goes round the stages."""
    return tuple(all_pieces(config)[stage :: config.parallel.pipeline_model_parallel_size])
