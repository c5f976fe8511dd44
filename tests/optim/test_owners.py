"""Parameters owned by some ranks, and pipeline stages, equal plain AdamW on one process."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state
from torch import nn

from mot_megatron.optim.norms import StepNorms
from mot_megatron.optim.zero import ZeroEngine
from mot_megatron.parallel.groups import ProcessGroups, build_process_groups
from mot_megatron.parallel.placement import Placement
from tests.optim import parts, toy
from tests.ranks import run_ranks

STEPS = 4
CPU = torch.device("cpu")
Shares = list[list[float]]
State = dict[str, dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Layout:
    """Process groups and the settings tried in them; data parallelism takes what is left."""

    shares: Shares
    settings: list[dict[str, Any]]
    tensor: int = 1
    pipeline: int = 1
    tied: bool = True
    whole: parts.Whole = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "whole", parts.Whole(len(self.shares[0]), self.tied))


def make_groups(layout: Layout) -> ProcessGroups:
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    placement = Placement(tuple(tuple(row) for row in layout.shares))
    return build_process_groups(
        layout.tensor,
        CPU,
        pipeline_model_parallel_size=layout.pipeline,
        placement=placement if placement.num_ranks > 1 else None,
    )


def make_engine(layout: Layout, groups: ProcessGroups, **settings: Any) -> tuple[ZeroEngine, int]:
    chosen = toy.settings(**({"gradient_accumulation_steps": 2} | settings))
    engine = ZeroEngine(
        parts.build_part(layout.whole, groups),
        chosen,
        groups,
        num_towers=layout.whole.num_towers,
    )
    return engine, chosen.gradient_accumulation_steps


def learning_rate(step: int) -> float:
    return 1e-2 / (1 + step)


def train(
    engine: ZeroEngine, layout: Layout, groups: ProcessGroups, steps: range, count: int
) -> list[StepNorms]:
    norms = []
    replicas = groups.data_size // groups.modality_size
    replica = groups.data_rank // groups.modality_size
    for step in steps:
        for batch in parts.micro_batches(step, layout.whole.num_towers, count, replica, replicas):
            if groups.pipeline_size > 1:
                engine.model(batch).total.backward()
            else:
                engine.backward(engine.forward(batch).total)
        if groups.pipeline_size > 1:
            engine.reduce_gradients()
        norms.append(engine.step(learning_rate(step)))
    return norms


def reference(
    layout: Layout, replicas: int, count: int, bf16: bool
) -> tuple[dict[str, torch.Tensor], list[StepNorms]]:
    """STEPS steps of torch's AdamW on one process, on the whole net.

    In bf16 backward is called for what each rank takes of each micro-batch, because the rounding
    depends on it, and its gradients are summed in fp32; in fp32 once for everything.
    """
    net = parts.build_whole(layout.whole, parallel_layers=bf16)
    master = {n: nn.Parameter(p.detach().clone()) for n, p in net.named_parameters()}
    if bf16:
        net.bfloat16()
        for name, parameter in net.named_parameters():
            master[name].data.copy_(parameter)
    placement = Placement(tuple(tuple(row) for row in layout.shares))
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in master.values() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in master.values() if p.ndim <= 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    history = []
    for step in range(STEPS):
        for parameter in master.values():
            parameter.grad = torch.zeros_like(parameter)
        pieces = replicas * count if bf16 else 1
        for batch in parts.micro_batches(step, layout.whole.num_towers, pieces, 0, 1):
            for rank in range(placement.num_ranks if bf16 else 1):
                net.taker = (placement, rank) if bf16 else None
                net.zero_grad()
                net(batch).total.backward()
                for name, parameter in net.named_parameters():
                    assert parameter.grad is not None
                    gradient = master[name].grad
                    assert gradient is not None
                    gradient += parameter.grad.float()
        history.append(reference_norms(master, layout.whole.num_towers))
        nn.utils.clip_grad_norm_(master.values(), 0.3)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                parameter.copy_(master[name])
    return {name: p.detach().clone() for name, p in master.items()}, history


def reference_norms(named: dict[str, nn.Parameter], num_towers: int) -> StepNorms:
    squares = [0.0] * (1 + num_towers)
    for name, parameter in named.items():
        assert parameter.grad is not None
        squares[1 + parts.tower_of_name(name)] += float(parameter.grad.square().sum())
    shared, *per_tower = map(math.sqrt, squares)
    return StepNorms(math.sqrt(sum(squares)), shared, tuple(per_tower))


def largest_error(
    layout: Layout, groups: ProcessGroups, settings: dict[str, Any]
) -> tuple[float, float]:
    """Deviation from the reference: of a norm (relative), of a weight (absolute)."""
    engine, count = make_engine(layout, groups, **settings)
    norms = train(engine, layout, groups, range(STEPS), count)
    bf16 = settings.get("precision") == "bf16"
    weights, expected = reference(layout, groups.data_size // groups.modality_size, count, bf16)
    norm_error = 0.0
    for got, want in zip(norms, expected, strict=True):
        assert got.finite
        for a, b in zip(
            (got.total, got.shared, *got.per_tower),
            (want.total, want.shared, *want.per_tower),
            strict=True,
        ):
            norm_error = max(norm_error, abs(a - b) / max(b, 1e-3))
    assert engine.optimizer_steps == STEPS
    state = dict(engine.export_state())
    assert list(state) == [name for name, _ in engine.model.named_parameters()]
    weight_error = 0.0
    for name, values in state.items():
        want = toy.shard(name, weights[name], groups.tensor_rank, groups.tensor_size)
        weight_error = max(weight_error, float((values["weight"] - want).abs().max()))
    return norm_error, weight_error


def _parity(layouts: list[Layout]) -> list[tuple[float, float]]:
    errors = []
    for layout in layouts:
        groups = make_groups(layout)
        errors += [largest_error(layout, groups, settings) for settings in layout.settings]
    return errors


def check_parity(world: int, layouts: list[Layout]) -> None:
    cases = [(layout, settings) for layout in layouts for settings in layout.settings]
    for rank, errors in enumerate(run_ranks(_parity, world, layouts, timeout=300.0)):
        for case, (norm_error, weight_error) in zip(cases, errors, strict=True):
            assert norm_error < 5e-6, (rank, case, norm_error)
            assert weight_error < 5e-6, (rank, case, weight_error)


ONE_EACH: Shares = [[1, 0], [0, 1]]
SPLIT: Shares = [[0.6, 0], [0.4, 1]]
THREE_ON_TWO: Shares = [[1, 0, 0], [0, 1, 1]]
TWO_ON_THREE: Shares = [[1, 0], [0, 0.5], [0, 0.5]]
RING: Shares = [[0.5, 0, 0.7], [0.5, 0.2, 0], [0, 0.8, 0.3]]

Z1 = {"zero_stage": 1}
Z2 = {"zero_stage": 2}


def test_two_ranks():
    check_parity(
        2,
        [
            Layout(ONE_EACH, [Z1, Z2]),
            Layout(SPLIT, [Z1, Z2]),
            Layout(THREE_ON_TWO, [Z1, Z2]),
        ],
    )


def test_three_ranks():
    check_parity(3, [Layout(TWO_ON_THREE, [Z1, Z2]), Layout(RING, [Z1, Z2])])


def test_four_ranks():
    check_parity(
        4,
        [
            Layout(THREE_ON_TWO, [Z1, Z2]),
            Layout(ONE_EACH, [Z1], tensor=2),
            Layout(ONE_EACH, [Z1], pipeline=2),
            Layout(THREE_ON_TWO, [Z1], pipeline=2, tied=False),
        ],
    )
