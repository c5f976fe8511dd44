"""Tests that towers on some ranks, and pipeline stages, equal plain AdamW on one process."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from torch import nn

from mot_megatron.model.sharding import SHARED, mark_experts
from mot_megatron.optim.norms import StepNorms
from mot_megatron.optim.owners import by_owners, has_owned_towers
from mot_megatron.optim.zero import ZeroEngine
from mot_megatron.parallel import buckets
from mot_megatron.parallel.groups import ProcessGroups, build_process_groups
from mot_megatron.parallel.placement import Placement
from tests.optim import parts, toy
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow

STEPS = 4
SMALL_BUCKET = 150
"""Elements of ZeRO-1's buckets in bf16, so that every group of owners has several."""
CPU = torch.device("cpu")
Shares = list[list[float]]
State = dict[str, dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Layout:
    """A layout and the settings to test with it; data parallelism uses the remaining ranks."""

    shares: Shares
    settings: list[dict[str, Any]]
    tensor: int = 1
    pipeline: int = 1
    tied: bool = True
    whole: parts.Whole = field(init=False)

    def __post_init__(self) -> None:
        whole = parts.Whole(len(self.shares[0]), self.tied, self.pipeline)
        object.__setattr__(self, "whole", whole)


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
    """Run STEPS steps of torch's AdamW with the whole net on one process.

    In fp32 there is one backward per step. In bf16 there is one per rank, micro-batch and stage,
    because rounding depends on it, and gradients are summed in fp32.
    """
    # In bf16, use megatron's layers, which round differently. That is impossible with tensor
    # parallelism, when megatron's layers cannot run unsharded.
    net = parts.build_whole(layout.whole, parallel_layers=bf16 and layout.tensor == 1)
    master = {n: nn.Parameter(p.detach().clone()) for n, p in net.named_parameters()}
    if bf16:
        net.bfloat16()
        for name, parameter in net.named_parameters():
            master[name].data.copy_(parameter)
    placement = Placement(tuple(tuple(row) for row in layout.shares))
    everything = range(layout.pipeline)
    takes: list[tuple[tuple[Placement, int] | None, range]] = [(None, everything)]
    if bf16:
        takes = [
            ((placement, rank), range(stage, stage + 1))
            for rank in range(placement.num_ranks)
            for stage in everything
        ]
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
            for net.taker, net.stages in takes:
                add_gradients(master, net, batch)
        history.append(reference_norms(master, layout.whole.num_towers))
        nn.utils.clip_grad_norm_(master.values(), 0.3)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                parameter.copy_(master[name])
    return {name: p.detach().clone() for name, p in master.items()}, history


def add_gradients(master: dict[str, nn.Parameter], net: parts.Net, batch: toy.Batch) -> None:
    net.zero_grad()
    net(batch).total.backward()
    for name, parameter in net.named_parameters():
        total = master[name].grad
        assert total is not None
        if parameter.grad is not None:
            total += parameter.grad.float()


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
    """Return the largest error of any norm (relative) and of any weight (absolute)."""
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
    buckets.REDUCED_TOGETHER = SMALL_BUCKET
    errors = []
    for layout in layouts:
        groups = make_groups(layout)
        errors += [largest_error(layout, groups, settings) for settings in layout.settings]
    return errors


def check_parity(world: int, layouts: list[Layout]) -> None:
    cases = [(layout, settings) for layout in layouts for settings in layout.settings]
    for rank, errors in enumerate(run_ranks(_parity, world, layouts, timeout=300.0)):
        for (layout, settings), (norm_error, weight_error) in zip(cases, errors, strict=True):
            norm_tolerance = weight_tolerance = 2e-6
            if layout.tensor > 1 and "precision" in settings:
                # The layers of the reference round differently in bf16. A tiny gradient may change
                # its sign, on which alone Adam's first steps depend: a difference of twice the
                # learning rate.
                norm_tolerance, weight_tolerance = 0.05, 0.03
            assert norm_error < norm_tolerance, (rank, layout, settings, norm_error)
            assert weight_error < weight_tolerance, (rank, layout, settings, weight_error)


ONE_EACH: Shares = [[1, 0], [0, 1]]
SPLIT: Shares = [[0.6, 0], [0.4, 1]]  # tower 0 is on all ranks, and rank 0 has no tower of its own
THREE_ON_TWO: Shares = [[1, 0, 0], [0, 1, 1]]
TWO_ON_THREE: Shares = [[1, 0], [0, 0.5], [0, 0.5]]
RING: Shares = [[0.5, 0, 0.7], [0.5, 0.2, 0], [0, 0.8, 0.3]]  # every two ranks share a tower
WITHOUT: Shares = [[1, 1, 1]]

Z1: dict[str, Any] = {"zero_stage": 1}
Z2: dict[str, Any] = {"zero_stage": 2}
OFFLOAD: dict[str, Any] = {"offload": "optimizer"}
BF16: dict[str, Any] = {"precision": "bf16"}


def test_owned_towers_on_two_ranks_equal_one_process():
    check_parity(
        2,
        [
            Layout(ONE_EACH, [Z1, Z2, Z1 | BF16, Z2 | BF16 | OFFLOAD]),
            Layout(SPLIT, [Z2, Z1 | BF16, Z1 | OFFLOAD]),
            Layout(THREE_ON_TWO, [Z1, Z2 | OFFLOAD, Z2 | BF16]),
        ],
    )


def test_owned_towers_on_three_ranks_equal_one_process():
    check_parity(
        3,
        [
            Layout(TWO_ON_THREE, [Z1, Z2]),
            Layout(RING, [Z1, Z2, Z2 | BF16, Z1 | BF16, Z1 | BF16 | OFFLOAD], tied=False),
        ],
    )


def test_pipeline_stages_and_tensor_parallelism_with_owned_towers():
    check_parity(
        4,
        [
            Layout(THREE_ON_TWO, [Z2, Z1 | BF16]),
            Layout(ONE_EACH, [Z1, Z1 | BF16], tensor=2),
            Layout(WITHOUT, [Z1], tensor=2, pipeline=2),
            Layout(ONE_EACH, [Z1, Z1 | BF16, Z1 | OFFLOAD, Z1 | BF16 | OFFLOAD], pipeline=2),
            Layout(THREE_ON_TWO, [Z1, Z1 | BF16], pipeline=2, tied=False),
        ],
    )


def _optimizer_elements() -> dict[str, int]:
    """Count the elements that AdamW updates on this rank, padded to a multiple of two per owner."""
    layout = Layout(TWO_ON_THREE, [])
    engine, _ = make_engine(layout, make_groups(layout))
    elements = {"shared": 0, "owned": 0}
    for group in engine._adamw.param_groups:
        kind = "owned" if "moe" in group else "shared"
        elements[kind] += sum(tensor.numel() for tensor in group["params"])
    return elements


def test_only_holders_of_a_tower_store_its_optimizer_state():
    first, second, third = run_ranks(_optimizer_elements, 3)
    weights = parts.initial_weights(parts.Whole(2))
    sizes = [0, 0, 0]
    for name, weight in weights.items():
        sizes[parts.tower_of_name(name) + 1] += weight.numel()
    shared, tower_0, tower_1 = sizes
    for rank in (first, second, third):
        assert shared / 3 <= rank["shared"] <= shared / 3 + 4
    assert tower_0 <= first["owned"] <= tower_0 + 4
    for rank in (second, third):
        assert tower_1 / 2 <= rank["owned"] <= tower_1 / 2 + 4


def _train_and_export(layout: Layout, settings: dict[str, Any], steps: range) -> State:
    groups = make_groups(layout)
    engine, count = make_engine(layout, groups, **settings)
    train(engine, layout, groups, steps, count)
    return dict(engine.export_state())


def merged(states: list[State]) -> State:
    """Merge the ranks' states into that of the whole net; check that replicas are equal."""
    whole: State = {}
    for state in states:
        for name, values in state.items():
            for key, value in values.items():
                assert torch.equal(whole.setdefault(name, values)[key], value), (name, key)
    return whole


def _import_and_finish(cases: list[tuple[Layout, dict[str, Any]]], start: State) -> list[State]:
    finals = []
    for layout, settings in cases:
        groups = make_groups(layout)
        engine, count = make_engine(layout, groups, **settings)
        train(engine, layout, groups, range(7, 8), count)  # so that no tensor has initial values
        engine.import_state(start, optimizer_steps=2)
        assert engine.optimizer_steps == 2
        for name, values in engine.export_state():
            for key, value in values.items():
                assert torch.equal(value, start[name][key]), (name, key)
        train(engine, layout, groups, range(2, STEPS), count)
        finals.append(dict(engine.export_state()))
    return finals


@pytest.mark.parametrize(
    ("world", "start", "cases"),
    [
        (
            3,
            Layout(RING, []),
            [
                (Layout(THREE_ON_TWO, []), Z2),
                (Layout(THREE_ON_TWO, []), Z1 | OFFLOAD),
                (Layout(WITHOUT, []), Z1),
            ],
        ),
        (4, Layout(ONE_EACH, [], pipeline=2), [(Layout([[1, 1]], [], pipeline=2), Z1)]),
    ],
)
def test_state_moves_between_placements(
    world: int, start: Layout, cases: list[tuple[Layout, dict[str, Any]]]
):
    state = merged(run_ranks(_train_and_export, world, start, Z1, range(2)))
    expected, _ = reference(start, 1, 1, bf16=False)
    assert state.keys() == expected.keys()
    for finals in zip(*run_ranks(_import_and_finish, 2, cases, state), strict=True):
        final = merged(list(finals))
        for name, weight in expected.items():
            assert float((final[name]["weight"] - weight).abs().max()) < 2e-6, name


def _not_a_number_on_one_rank() -> None:
    for layout, settings in [
        (Layout(ONE_EACH, []), Z1),
        (Layout(ONE_EACH, []), Z2 | OFFLOAD),
        (Layout(ONE_EACH, []), Z1 | BF16),
        (Layout(ONE_EACH, []), Z1 | BF16 | OFFLOAD),
        (Layout(WITHOUT, [], pipeline=2), Z1 | BF16),
        (Layout(WITHOUT, [], pipeline=2), Z1),
    ]:
        groups = make_groups(layout)
        undisturbed, count = make_engine(layout, groups, **settings)
        train(undisturbed, layout, groups, range(2), count)

        engine, count = make_engine(layout, groups, **settings)
        train(engine, layout, groups, range(1), count)
        before = dict(engine.export_state())
        with torch.no_grad():
            # A parameter of an owned tower, so that no reduction carries the NaN to another rank.
            own = next(p for n, p in engine.model.named_parameters() if "scale" in n)
            kept = own.clone()
            own.fill_(math.nan if groups.rank == 1 else kept.item())
        (norms,) = train(engine, layout, groups, range(5, 6), count)
        assert not norms.finite
        with torch.no_grad():
            own.copy_(kept)
        for name, values in engine.export_state():
            for key, value in values.items():
                assert torch.equal(value, before[name][key]), (layout, settings, name)
        train(engine, layout, groups, range(1, 2), count)
        for (name, got), (_, want) in zip(
            engine.export_state(), undisturbed.export_state(), strict=True
        ):
            assert torch.equal(got["weight"], want["weight"]), (layout, settings, name)
        assert engine.optimizer_steps == 2


def test_a_nan_on_the_only_holder_of_a_tower_skips_the_step_on_all_ranks():
    run_ranks(_not_a_number_on_one_rank, 2, timeout=300.0)


def _leave_a_tower_out() -> str:
    layout = Layout(WITHOUT, [], pipeline=2)
    groups = make_groups(layout)
    engine, count = make_engine(layout, groups)
    layer = next(m for m in engine.model.modules() if isinstance(m, parts.Layer))
    layer.towers["1"].forward = lambda inputs: 0 * inputs
    with pytest.raises(RuntimeError) as error:
        train(engine, layout, groups, range(1), count)
    return str(error.value)


def test_a_stage_reports_a_parameter_without_gradient():
    first, second = run_ranks(_leave_a_tower_out, 2)
    assert "layers.0.towers.1.down.bias" in first
    assert "layers.1.towers.1.down.bias" in second
    assert "towers.0" not in first + second


def _owners_of_experts(expert_size: int, shares: Shares) -> tuple[bool, list[Any]]:
    """Return ``has_owned_towers``, and ranks, whether named, and parameters of each ``Owned``."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    placement = Placement(tuple(tuple(row) for row in shares)) if len(shares) > 1 else None
    groups = build_process_groups(
        1, CPU, expert_model_parallel_size=expert_size, placement=placement
    )
    labels: dict[nn.Parameter, str] = {}
    for tower in reversed([SHARED, *groups.towers_held(len(shares[0]))]):
        for of_experts in (True, False) if tower != SHARED else (False,):
            parameter = nn.Parameter(torch.zeros(4, 2))
            parameter.tower = tower  # type: ignore[attr-defined]
            if of_experts:
                mark_experts(parameter, groups.experts_of(tower).held(4))
            labels[parameter] = f"{tower}{'e' if of_experts else ''}"
    found = [
        (
            torch.distributed.get_process_group_ranks(owned.group),
            owned.name is not None,
            [labels[parameter] for parameter in owned.parameters],
        )
        for owned in by_owners(labels, groups)
    ]
    return has_owned_towers(groups), found


def test_experts_are_owned_by_the_ranks_that_hold_them():
    plain = run_ranks(_owners_of_experts, 4, 1, WITHOUT)
    everything = ["2e", "2", "1e", "1", "0e", "0", "-1"]
    assert plain == [(False, [([0, 1, 2, 3], False, everything)])] * 4
    spread = run_ranks(_owners_of_experts, 4, 2, [[1.0, 1.0]])
    for rank, outcome in enumerate(spread):
        same = [rank % 2, rank % 2 + 2]
        # Parameters of all ranks come first, experts last.
        owners = [([0, 1, 2, 3], False, ["1", "0", "-1"]), (same, True, ["1e", "0e"])]
        assert outcome == (True, owners)


def test_experts_are_sharded_over_the_holders_of_their_tower():
    # Tower 0 on ranks 0 and 2, tower 1 on ranks 1 and 3: two groups of two.
    for rank, outcome in enumerate(run_ranks(_owners_of_experts, 4, 2, ONE_EACH)):
        tower = rank % 2
        assert outcome == (
            True,
            [
                ([0, 1, 2, 3], False, ["-1"]),
                ([tower, tower + 2], True, [f"{tower}"]),
                ([rank], True, [f"{tower}e"]),
            ],
        )
