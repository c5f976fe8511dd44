"""Buckets of ZeRO-1 in bf16: their sizes, when they are reduced, and that they change no result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mot_megatron.optim import reduction
from mot_megatron.optim.zero import ZeroEngine
from mot_megatron.parallel import buckets as bucket_sizes
from mot_megatron.parallel.buckets import buckets
from mot_megatron.parallel.groups import build_process_groups
from tests.optim import toy
from tests.ranks import run_ranks

CPU = torch.device("cpu")
SMALL = 150
"""Elements; the toy net has seven matrices of 60 to 220."""
MICRO_BATCHES = 2


@pytest.mark.parametrize(
    ("sizes", "largest", "counts"),
    [
        ([], None, []),
        ([5, 6, 7], None, [3]),
        ([5, 6, 7], 18, [3]),
        ([5, 6, 7], 17, [2, 1]),
        ([5, 6, 7], 1, [1, 1, 1]),
        ([50, 1, 1, 50], 10, [1, 2, 1]),
    ],
)
def test_buckets_are_runs_of_parameters(
    sizes: Sequence[int], largest: int | None, counts: list[int]
) -> None:
    assert buckets(sizes, largest) == counts


class Recorder:
    """Records when reduce-scatters start."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.original: Callable[..., Any] = dist.reduce_scatter_tensor

    def __call__(self, output: torch.Tensor, *rest: Any, **named: Any) -> Any:
        self.events.append("reduce-scatter")
        return self.original(output, *rest, **named)


def _steps(largest: int) -> tuple[list[list[str]], int, dict[str, torch.Tensor], list[Any]]:
    """Return the events of every step, the number of buckets, the weights and the norms."""
    bucket_sizes.REDUCED_TOGETHER = largest
    groups = build_process_groups(1, CPU)
    # The factor of clipping depends on how norms are summed.
    settings = toy.settings(
        precision="bf16", gradient_accumulation_steps=MICRO_BATCHES, clip_grad=0.0
    )
    engine = ZeroEngine(toy.build(toy.initial_weights(), groups), settings, groups)
    recorder = Recorder()
    reduction.dist.reduce_scatter_tensor = recorder  # type: ignore[assignment]
    # The first parameter of the net: its gradient, as the embedding's, comes last.
    first = next(iter(engine.model.parameters()))
    first.register_hook(lambda _: recorder.events.append("last gradient"))
    history, norms = [], []
    for step in range(3):
        recorder.events.clear()
        for batch in toy.micro_batches(step, MICRO_BATCHES, groups.data_rank, groups.data_size):
            engine.backward(engine.forward(batch).total)
            recorder.events.append("end of backward")
        history.append(list(recorder.events))
        norms.append(engine.step(1e-2))
    weights = {name: state["weight"] for name, state in engine.export_state()}
    return history, len(engine._adamw.param_groups), weights, norms


@pytest.mark.slow
def test_buckets_are_reduced_under_the_last_backward_and_change_no_result() -> None:
    of_small, of_one = run_ranks(_steps, 2, SMALL), run_ranks(_steps, 2, 10**9)
    for small, one in zip(of_small, of_one, strict=True):
        history, count, weights, norms = small
        assert count > one[1] == 2
        for events in history:
            first, second = events.index("end of backward"), len(events)
            assert "reduce-scatter" not in events[:first]
            assert events.count("reduce-scatter") == count
            under_backward = events[first + 1 : second]
            before_last = under_backward[: under_backward.index("last gradient")]
            assert before_last.count("reduce-scatter") >= 1
        # Of two ranks: a sum of two terms does not depend on the order.
        assert all(torch.equal(weights[name], one[2][name]) for name in weights)
        # Parts of the gradients are summed in another order.
        for got, want in zip(norms, one[3], strict=True):
            assert got.total == pytest.approx(want.total, rel=1e-6)
