"""Tests that every ZeRO stage equals plain AdamW on one process, also after a resume."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn

from mot_megatron.optim.norms import StepNorms
from mot_megatron.optim.zero import ZeroEngine
from mot_megatron.parallel.groups import ProcessGroups, build_process_groups
from tests.optim import toy
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow

STEPS = 4
CPU = torch.device("cpu")
Weights = dict[str, torch.Tensor]
State = dict[str, dict[str, torch.Tensor]]


def learning_rate(step: int) -> float:
    return 1e-2 / (1 + step)


def make_engine(
    groups: ProcessGroups, reentrant: bool | None = None, **changes: Any
) -> tuple[ZeroEngine, int]:
    """Return an engine for the toy net, and its micro-batches per step."""
    settings = toy.settings(**changes)
    net = toy.build(toy.initial_weights(), groups, reentrant)
    return ZeroEngine(net, settings, groups), settings.gradient_accumulation_steps


def train(
    engine: ZeroEngine, groups: ProcessGroups, steps: Iterable[int], count: int
) -> list[StepNorms]:
    norms = []
    for step in steps:
        for batch in toy.micro_batches(step, count, groups.data_rank, groups.data_size):
            engine.backward(engine.forward(batch).total)
        norms.append(engine.step(learning_rate(step)))
    return norms


def copy_state(engine: ZeroEngine) -> State:
    return dict(engine.export_state())


def assert_same_bits(got: State, want: State) -> None:
    assert list(got) == list(want)
    for name in want:
        for key in ("weight", "exp_avg", "exp_avg_sq"):
            assert torch.equal(got[name][key], want[name][key]), (name, key)


def reference(net: toy.Net, clip_grad: float, parts: int) -> tuple[Weights, list[StepNorms]]:
    """Run STEPS steps of fp32 AdamW in one process, with gradients of ``net`` summed in fp32.

    Args:
        net: Unsharded net with the initial weights, in the precision of forward and backward. The
            fp32 weights are initialized from these.
        clip_grad: Maximum norm; 0: no clipping.
        parts: Number of equal parts of a step's sequences, with one backward each; in bf16,
            rounding depends on it.

    Returns:
        The final fp32 weights, and the norms of every step.
    """
    master = {n: nn.Parameter(p.detach().clone().float()) for n, p in net.named_parameters()}
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
        sums = {name: torch.zeros_like(p) for name, p in master.items()}
        for name, parameter in master.items():
            parameter.grad = sums[name]
        for batch in toy.micro_batches(step, parts, 0, 1):
            net.zero_grad()
            net(batch).total.backward()
            for name, parameter in net.named_parameters():
                assert parameter.grad is not None
                sums[name] += parameter.grad.float()
        history.append(reference_norms(master))
        if clip_grad:
            nn.utils.clip_grad_norm_(master.values(), clip_grad)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                parameter.copy_(master[name])
    return {name: p.detach().clone() for name, p in master.items()}, history


def reference_norms(named: dict[str, nn.Parameter]) -> StepNorms:
    squares = [0.0] * (1 + toy.NUM_TOWERS)
    for name, parameter in named.items():
        assert parameter.grad is not None
        squares[1 + toy.tower_of_name(name)] += float(parameter.grad.square().sum())
    shared, *per_tower = map(math.sqrt, squares)
    return StepNorms(math.sqrt(sum(squares)), shared, tuple(per_tower))


def parity_error(groups: ProcessGroups, case: dict[str, Any]) -> tuple[float, float]:
    """Return the largest error of any norm (relative) and of any weight (absolute)."""
    engine, count = make_engine(groups, **case)
    norms = train(engine, groups, range(STEPS), count)
    if case.get("precision") == "bf16":  # megatron's layers round the bias addition differently
        net = toy.build(toy.initial_weights(), groups).bfloat16()
    else:
        net = toy.build(toy.initial_weights())
    weights, expected = reference(net, case.get("clip_grad", 0.3), groups.data_size * count)
    norm_error = 0.0
    for got, want in zip(norms, expected, strict=True):
        assert got.finite
        for a, b in zip(
            (got.total, got.shared, *got.per_tower),
            (want.total, want.shared, *want.per_tower),
            strict=True,
        ):
            norm_error = max(norm_error, abs(a - b) / b)
    assert engine.optimizer_steps == STEPS
    state = copy_state(engine)
    assert list(state) == list(weights)
    weight_error = 0.0
    for name, values in state.items():
        want = toy.shard(name, weights[name], groups.tensor_rank, groups.tensor_size)
        weight_error = max(weight_error, float((values["weight"] - want).abs().max()))
    return norm_error, weight_error


def _parity(tensor_parallel_size: int, cases: list[dict[str, Any]]) -> list[tuple[float, float]]:
    groups = build_process_groups(tensor_parallel_size, CPU)
    return [parity_error(groups, case) for case in cases]


def check_parity(
    world: int, tensor_parallel_size: int, cases: list[dict[str, Any]], tolerance: float
) -> None:
    results = run_ranks(_parity, world, tensor_parallel_size, cases, timeout=300.0)
    for rank, errors in enumerate(results):
        for case, (norm_error, weight_error) in zip(cases, errors, strict=True):
            assert norm_error < tolerance, (rank, case)
            assert weight_error < tolerance, (rank, case)


def test_every_stage_equals_adamw_on_one_process():
    check_parity(
        2,
        1,
        [
            {"zero_stage": 0},
            {"zero_stage": 0, "gradient_accumulation_steps": 4, "clip_grad": 0.0},
            {"zero_stage": 1, "gradient_accumulation_steps": 2},
            {"zero_stage": 1, "offload": "optimizer", "gradient_accumulation_steps": 2},
            {"zero_stage": 2},
            {"zero_stage": 2, "gradient_accumulation_steps": 4},
            {"zero_stage": 2, "offload": "optimizer", "gradient_accumulation_steps": 2},
            {"zero_stage": 3, "gradient_accumulation_steps": 2, "clip_grad": 0.0},
            {"zero_stage": 3, "offload": "optimizer", "gradient_accumulation_steps": 4},
            {"zero_stage": 3, "reentrant": False, "gradient_accumulation_steps": 2},
            {"zero_stage": 3, "reentrant": True},
        ],
        tolerance=1e-6,
    )


def test_bf16_equals_fp32_adamw_on_bf16_gradients_summed_in_fp32():
    check_parity(
        2,
        1,
        [
            {"precision": "bf16", "zero_stage": stage, "gradient_accumulation_steps": count}
            | ({"offload": "optimizer"} if offload else {})
            for stage, count, offload in [
                (1, 4, False),
                (1, 2, True),
                (2, 4, False),
                (2, 2, True),
                (3, 4, False),
                (3, 2, True),
            ]
        ],
        tolerance=1e-6,
    )


def test_tensor_parallel_times_data_parallel():
    check_parity(
        4,
        2,
        [
            {"zero_stage": 0},
            {"zero_stage": 1, "gradient_accumulation_steps": 2},
            {"zero_stage": 2},
            {"zero_stage": 3, "offload": "optimizer"},
            {"zero_stage": 3, "reentrant": False},
        ],
        tolerance=2e-6,
    )


def test_three_ranks_with_sizes_not_divisible_by_three():
    check_parity(
        3,
        1,
        [{"zero_stage": stage} for stage in (0, 1, 2, 3)],
        tolerance=2e-6,
    )


LAYOUTS: list[dict[str, Any]] = [
    {"zero_stage": 0},
    {"zero_stage": 1},
    {"zero_stage": 2, "gradient_accumulation_steps": 2},
    {"zero_stage": 3},
    {"zero_stage": 1, "offload": "optimizer"},
    {"zero_stage": 3, "offload": "optimizer"},
    {"zero_stage": 1, "precision": "bf16"},
    {"zero_stage": 1, "precision": "bf16", "offload": "optimizer"},
    {"zero_stage": 2, "precision": "bf16", "offload": "optimizer"},
    {"zero_stage": 3, "precision": "bf16", "offload": "optimizer"},
]


def _resume_in_place() -> None:
    """Compare four steps of one engine with a second one that resumes after two of them."""
    groups = build_process_groups(1, CPU)
    for layout in LAYOUTS:
        engine, count = make_engine(groups, **layout)
        train(engine, groups, [0, 1], count)
        halfway = copy_state(engine)
        expected = train(engine, groups, [2, 3], count)

        resumed, count = make_engine(groups, **layout)
        train(resumed, groups, [7], count)  # so that no tensor has its initial values
        resumed.import_state(halfway, optimizer_steps=2)
        assert_same_bits(copy_state(resumed), halfway)
        assert train(resumed, groups, [2, 3], count) == expected, layout
        assert_same_bits(copy_state(resumed), copy_state(engine))
        assert resumed.optimizer_steps == 4


def test_resume_is_bitwise_in_every_layout():
    run_ranks(_resume_in_place, 2, timeout=300.0)


def _first_steps() -> State:
    groups = build_process_groups(1, CPU)
    engine, count = make_engine(groups, zero_stage=2)
    train(engine, groups, [0, 1], count)
    return copy_state(engine)


def _resume_elsewhere(state: State, layouts: list[dict[str, Any]]) -> list[State]:
    groups = build_process_groups(1, CPU)
    finals = []
    for layout in layouts:
        engine, count = make_engine(groups, **layout)
        engine.import_state(state, optimizer_steps=2)
        assert_same_bits(copy_state(engine), state)
        train(engine, groups, [2, 3], count)
        finals.append(copy_state(engine))
    return finals


@pytest.mark.parametrize("world", [1, 3])
def test_state_moves_between_stages_and_data_parallel_sizes(world: int):
    state, _ = run_ranks(_first_steps, 2)
    layouts: list[dict[str, Any]] = [{"zero_stage": stage} for stage in (0, 1, 2, 3)]
    layouts.append({"zero_stage": 3, "offload": "optimizer", "gradient_accumulation_steps": 2})
    weights, _ = reference(toy.build(toy.initial_weights()), 0.3, 1)
    for finals in run_ranks(_resume_elsewhere, world, state, layouts):
        for layout, final in zip(layouts, finals, strict=True):
            for name, weight in weights.items():
                error = float((final[name]["weight"] - weight).abs().max())
                assert error < 2e-6, (layout, name)


def _not_a_number() -> None:
    """Run a step with a NaN on one rank, between normal steps."""
    groups = build_process_groups(1, CPU)
    probe = toy.Batch(toy.step_tokens(9), 1.0)
    for layout in LAYOUTS:
        undisturbed, count = make_engine(groups, **layout)
        train(undisturbed, groups, [0, 1], count)

        engine, count = make_engine(groups, **layout)
        train(engine, groups, [0], count)
        before = copy_state(engine)
        with torch.no_grad():
            loss = engine.forward(probe).total
        for index, batch in enumerate(
            toy.micro_batches(5, count, groups.data_rank, groups.data_size)
        ):
            if groups.data_rank == 1 and index == 0:
                batch.factor = math.nan
            engine.backward(engine.forward(batch).total)
        assert not engine.step(1e-2).finite, layout
        assert_same_bits(copy_state(engine), before)
        with torch.no_grad():
            assert torch.equal(engine.forward(probe).total, loss), layout
        train(engine, groups, [1], count)
        assert_same_bits(copy_state(engine), copy_state(undisturbed))
        assert engine.optimizer_steps == 2, layout


def test_a_step_with_nan_on_one_rank_changes_nothing_on_any():
    run_ranks(_not_a_number, 2, timeout=300.0)


def _leave_a_tower_out() -> str:
    groups = build_process_groups(1, CPU)
    engine, _ = make_engine(groups, zero_stage=3)
    train(engine, groups, [0], 1)
    engine.model.towers[1].forward = torch.zeros_like  # type: ignore[union-attr, operator]
    with pytest.raises(RuntimeError) as error:
        train(engine, groups, [1], 1)
    return str(error.value)


def test_a_parameter_without_gradient_is_an_error():
    for message in run_ranks(_leave_a_tower_out, 2):
        assert "towers.1.up.weight" in message
        assert "towers.0" not in message
