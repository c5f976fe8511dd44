"""Every ZeRO stage equals plain AdamW on one process."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from mot_megatron.optim.norms import StepNorms
from mot_megatron.optim.zero import ZeroEngine
from mot_megatron.parallel.groups import ProcessGroups, build_process_groups
from tests.optim import toy
from tests.ranks import run_ranks

STEPS = 4
CPU = torch.device("cpu")


def learning_rate(step: int) -> float:
    return 1e-2 / (1 + step)


def train(engine: ZeroEngine, groups: ProcessGroups, steps: range, count: int) -> list[StepNorms]:
    norms = []
    for step in steps:
        for batch in toy.micro_batches(step, count, groups.data_rank, groups.data_size):
            engine.backward(engine.forward(batch).total)
        norms.append(engine.step(learning_rate(step)))
    return norms


def reference(clip_grad: float) -> tuple[dict[str, torch.Tensor], list[StepNorms]]:
    """Weights after STEPS steps of torch's AdamW in one process, and the norms on the way."""
    net = toy.build(toy.initial_weights())
    named = dict(net.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in named.values() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in named.values() if p.ndim <= 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    history = []
    for step in range(STEPS):
        optimizer.zero_grad()
        net(toy.micro_batches(step, 1, 0, 1)[0]).total.backward()
        squares = [0.0] * (1 + toy.NUM_TOWERS)
        for name, parameter in named.items():
            assert parameter.grad is not None
            squares[1 + toy.tower_of_name(name)] += float(parameter.grad.square().sum())
        shared, *per_tower = map(math.sqrt, squares)
        history.append(StepNorms(math.sqrt(sum(squares)), shared, tuple(per_tower)))
        if clip_grad:
            nn.utils.clip_grad_norm_(named.values(), clip_grad)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
    return {name: p.detach().clone() for name, p in named.items()}, history


def check_parity(groups: ProcessGroups, tolerance: float = 1e-6, **changes: Any) -> None:
    settings = toy.settings(**changes)
    recompute = settings.zero_stage == 3
    engine = ZeroEngine(toy.build(toy.initial_weights(), groups, recompute), settings, groups)
    norms = train(engine, groups, range(STEPS), settings.gradient_accumulation_steps)
    weights, expected = reference(settings.clip_grad)
    for got, want in zip(norms, expected, strict=True):
        assert got.finite
        assert got.total == pytest.approx(want.total, rel=tolerance, abs=tolerance), changes
        assert got.shared == pytest.approx(want.shared, rel=tolerance, abs=tolerance)
        assert got.per_tower == pytest.approx(want.per_tower, rel=tolerance, abs=tolerance)
    assert engine.optimizer_steps == STEPS
    names = []
    for name, state in engine.export_state():
        names.append(name)
        want = toy.shard(name, weights[name], groups.tensor_rank, groups.tensor_size)
        torch.testing.assert_close(
            state["weight"],
            want,
            rtol=0,
            atol=tolerance,
            msg=lambda m, name=name: f"{changes} {name}: {m}",
        )
    assert names == list(weights)


PARITY = [
    {"zero_stage": 0},
    {"zero_stage": 1},
    {"zero_stage": 2},
    {"zero_stage": 3},
]


def _parity_on_two_ranks() -> None:
    groups = build_process_groups(1, CPU)
    for changes in PARITY:
        check_parity(groups, **changes)
        print("ok", changes, flush=True)


def test_parity():
    run_ranks(_parity_on_two_ranks, 2)
