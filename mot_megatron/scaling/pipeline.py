"""Time of a pipeline schedule: megatron-core's 1F1B and its interleaved form, simulated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class _Pass(NamedTuple):
    """Forward or backward of one micro-batch through one piece of a stage."""

    backward: bool
    piece: int
    micro_batch: int


def pipeline_seconds(
    forward: Sequence[float],
    backward: Sequence[float],
    micro_batches: int,
    *,
    pieces: int = 1,
    message: float = 0.0,
) -> float:
    """Return the time from the first forward to the last backward of any stage.

    Args:
        forward: Seconds of a micro-batch's forward on each stage, over all its pieces.
        backward: The same of its backward.
        micro_batches: Micro-batches per step; with several pieces, a multiple of the stages.
        pieces: Pieces per stage, assigned round-robin.
        message: Seconds that a message between stages takes.
    """
    stages = len(forward)
    orders = [_order(stage, stages, micro_batches, pieces) for stage in range(stages)]
    ends: dict[tuple[int, _Pass], float] = {}
    positions, free = [0] * stages, [0.0] * stages
    left = sum(map(len, orders))
    while left:
        before = left
        for stage, order in enumerate(orders):
            while positions[stage] < len(order):
                current = order[positions[stage]]
                source = _source(stage, current, stages, pieces)
                if source is not None and source not in ends:
                    break
                arrives = 0.0
                if source is not None:
                    arrives = ends[source] + (message if source[0] != stage else 0.0)
                seconds = (backward if current.backward else forward)[stage] / pieces
                free[stage] = max(free[stage], arrives) + seconds
                ends[stage, current] = free[stage]
                positions[stage] += 1
                left -= 1
        assert left < before, "the schedule deadlocks"
    return max(free)


def _order(stage: int, stages: int, micro_batches: int, pieces: int) -> list[_Pass]:
    """Return the passes of a stage in the order in which megatron-core runs them."""
    total = micro_batches * pieces
    if pieces == 1:
        warmup = min(total, stages - stage - 1)
    else:
        assert micro_batches % stages == 0, (micro_batches, stages)
        warmup = min(total, 2 * (stages - stage - 1) + (pieces - 1) * stages)
        if micro_batches == stages:
            warmup = total

    def at(number: int, backward: bool) -> _Pass:
        group, rest = divmod(number, stages * pieces)
        piece, place = divmod(rest, stages)
        piece = pieces - 1 - piece if backward else piece
        return _Pass(backward, piece, group * stages + place if pieces > 1 else number)

    order = [at(number, backward=False) for number in range(warmup)]
    for number in range(total - warmup):
        order += [at(warmup + number, backward=False), at(number, backward=True)]
    return order + [at(number, backward=True) for number in range(total - warmup, total)]


def _source(stage: int, current: _Pass, stages: int, pieces: int) -> tuple[int, _Pass] | None:
    """Return the stage and the pass whose output a pass needs; None if it needs none."""
    backward, piece, micro_batch = current
    step = 1 if backward else -1
    place = piece * stages + stage + step
    if place == stages * pieces:  # the loss is at hand after the last forward
        return stage, _Pass(False, piece, micro_batch)
    if place < 0:
        return None
    return place % stages, _Pass(backward, place // stages, micro_batch)
