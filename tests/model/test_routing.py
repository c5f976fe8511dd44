"""Routers: equal shares per expert, no effect of padding, and causality in causal mode."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mot_megatron.config_model import ExpertsConfig
from mot_megatron.model.routing import (
    ExpertChoiceRouter,
    ExpertUse,
    Router,
    RoutingMode,
    RoutingPool,
    router_class,
)
from mot_megatron.model.sharding import is_auxiliary
from tests.model.small_models import one_sequence

HIDDEN = 8


def router_of(seed: int = 0, **config: object) -> Router:
    """Build a router with random weights for a tower on a single rank."""
    settings = ExpertsConfig.model_validate({"num_moe_experts": 4, **config})
    router = router_class(settings)(settings, HIDDEN, 0, RoutingMode((1.0,)), None, None)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return router


def rows_of(seed: int, count: int) -> torch.Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))


def full_pool(count: int) -> RoutingPool:
    return one_sequence(torch.ones(count, dtype=torch.bool))


@st.composite
def pools(draw: st.DrawFn) -> RoutingPool:
    filled = torch.tensor(draw(st.lists(st.booleans(), max_size=40)), dtype=torch.bool)
    return one_sequence(filled)


@settings(deadline=None)
@given(
    pools(),
    st.integers(1, 6),
    st.sampled_from([0.25, 0.5, 1.0, 1.5, 2.0]),
    st.sampled_from(["sigmoid", "softmax"]),
    st.integers(0, 1000),
)
def test_every_expert_takes_the_same_number_of_tokens(
    pool: RoutingPool, num_experts: int, c: float, gate: str, seed: int
) -> None:
    c = min(c, num_experts)
    router = router_of(seed, num_moe_experts=num_experts, capacity_factor=c, gate=gate)
    routing = router(rows_of(seed, len(pool.filled)), pool)
    # c n / E, rounded up to whole tokens.
    share = math.ceil(c * pool.num_tokens / num_experts)
    assert routing.assigned.sum(0).tolist() == [share] * num_experts
    assert not routing.assigned[~pool.filled].any()
    assert torch.equal(routing.weights != 0, routing.assigned)
    assert routing.chosen is not None
    assert routing.chosen.shape == (num_experts, share)
    for expert, rows in enumerate(routing.chosen.tolist()):
        assert rows == routing.assigned[:, expert].nonzero().flatten().tolist()


@pytest.mark.parametrize("num_tokens", [300, 3000])
@pytest.mark.parametrize("num_experts", [3, 7, 10])
def test_floating_point_error_does_not_round_a_share_up(num_tokens: int, num_experts: int) -> None:
    # 0.1 * 300 / 10 is above 3 in floating point.
    router = router_of(num_moe_experts=num_experts, capacity_factor=num_experts / 10)
    counts = router(rows_of(0, num_tokens), full_pool(num_tokens)).assigned.sum(0)
    assert counts.tolist() == [num_tokens // 10] * num_experts


def test_experts_rank_tokens_correctly_if_gates_saturate() -> None:
    router = router_of(num_moe_experts=1, capacity_factor=0.5)
    with torch.no_grad():
        router.weight.fill_(1.0)
    # Logits 80, 160, 240, 320: a sigmoid in fp32 is 1 for all of them.
    x = torch.arange(1, 5)[:, None].expand(4, HIDDEN) * 10.0
    assert router(x, full_pool(4)).assigned.flatten().tolist() == [False, False, True, True]


@pytest.mark.parametrize(
    "config",
    [
        {"capacity_factor": 1.5, "causal_router": True, "z_loss_coefficient": 0.1},
        {"gate": "softmax", "z_loss_coefficient": 0.1},
        {
            "routing": "topk",
            "topk": 2,
            "capacity_factor": 0.6,
            "aux_loss_coefficient": 1.0,
            "z_loss_coefficient": 0.1,
        },
    ],
    ids=lambda config: config.get("routing", config.get("gate", "expert_choice")),
)
def test_contents_of_padding_do_not_change_routing(config: dict[str, object]) -> None:
    filled = torch.tensor([True] * 6 + [False] * 3 + [True] * 5 + [False])
    pool = one_sequence(filled)
    found = []
    for padding in (0.0, 1.0, 1e4, -1e4):
        router, x = router_of(3, **config), rows_of(4, len(filled))
        x[~filled] = padding
        x.requires_grad_()
        routing = router(x, pool)
        routing.weights.square().sum().backward()
        assert x.grad is not None
        assert not x.grad[~filled].any()
        assert not routing.weights[~filled].any()
        gradients = [parameter.grad for parameter in router.parameters()]
        statistics = router.statistics.take(torch.device("cpu"))
        found.append((routing.weights, routing.assigned, x.grad, statistics, *gradients))
    for other in found[1:]:
        for value, same in zip(other, found[0], strict=True):
            torch.testing.assert_close(value, same, rtol=0, atol=0)


def test_top_k_at_capacity_drops_the_smallest_weights() -> None:
    config = {"routing": "topk", "topk": 2, "gate": "softmax"}
    x, pool = rows_of(6, 40), full_pool(40)
    everything = router_of(5, **config)(x, pool)
    kept = router_of(5, **config, capacity_factor=0.75)(x, pool)
    assert torch.equal(everything.assigned.sum(1), torch.full((40,), 2))
    for expert in range(4):
        wanted = everything.weights[:, expert]
        largest = wanted.sort(descending=True).values[:15]  # 0.75 * 2 * 40 / 4
        threshold = largest[-1].clamp_min(torch.finfo().tiny)
        assert torch.equal(kept.assigned[:, expert], wanted >= threshold)
        assert torch.equal(kept.weights[:, expert], wanted * (wanted >= threshold))
    assert everything.assigned.sum(0).max() > 15  # the capacity dropped some tokens


@pytest.mark.parametrize(
    "config", [{"causal_router": True}, {"routing": "topk", "capacity_factor": 0.5}], ids=str
)
def test_causal_mode_does_not_depend_on_later_tokens(config: dict[str, object]) -> None:
    router, x, pool = router_of(7, **config), rows_of(8, 20), full_pool(20)
    trained = router(x, pool)
    changed = x.clone()
    changed[12:] = rows_of(9, 8) * 5
    # In training mode, a later token can displace an earlier one.
    assert not torch.equal(router(changed, pool).assigned[:12], trained.assigned[:12])
    router.mode.causal = True
    first, other = router(x, pool), router(changed, pool)
    torch.testing.assert_close(first.weights[:12], other.weights[:12], rtol=0, atol=1e-6)
    assert torch.equal(first.assigned[:12], other.assigned[:12])
    for row in range(3):  # a token is routed the same on its own
        alone = router(x[row : row + 1], full_pool(1))
        assert torch.equal(alone.assigned[0], first.assigned[row])
        torch.testing.assert_close(alone.weights[0], first.weights[row], rtol=0, atol=1e-6)


def test_expert_use_is_counted_only_while_enabled() -> None:
    router = router_of(7, causal_router=True)
    pool = one_sequence(torch.tensor([True] * 9 + [False] * 3))
    router(rows_of(8, 12), pool)
    router.mode.use = use = {}
    taken, untaken = 0, 0
    for router.mode.causal in (False, True):
        assigned = router(rows_of(8, 12), pool).assigned[:9]
        taken += int(assigned.sum())
        untaken += sum(not any(of_token) for of_token in assigned.tolist())
    assert use == {0: ExpertUse(tokens=18, taken=taken, untaken=untaken)}
    router.mode.use = None
    router(rows_of(8, 12), pool)
    assert use[0].tokens == 18


def test_causal_router_takes_tokens_with_probability_above_one_half() -> None:
    router, x = router_of(10, causal_router=True), rows_of(11, 30)
    filled = torch.arange(30) % 7 != 0
    pool = one_sequence(filled)
    weights = dict(router.named_parameters())
    inner = x @ weights["causal.hidden"].T
    p = torch.sigmoid((inner * torch.sigmoid(inner)) @ weights["causal.output"].T)
    assert p.shape == (30, 4)
    assert {name for name, each in weights.items() if is_auxiliary(each)} == {
        "causal.hidden",
        "causal.output",
    }
    router.mode.causal = True
    routing = router(x, pool)
    assert torch.equal(routing.assigned, (p > 0.5) & filled[:, None])
    gate = torch.sigmoid(x @ router.weight.T)
    torch.testing.assert_close(routing.weights, gate * routing.assigned)
    assert routing.chosen is None


def test_causal_router_learns_the_choices_without_changing_other_gradients() -> None:
    with_router, without = router_of(12, causal_router=True), router_of(12)
    without.load_state_dict({"weight": with_router.weight.detach()})
    assert isinstance(with_router, ExpertChoiceRouter)
    assert with_router.causal is not None
    optimizer = torch.optim.AdamW(with_router.causal.parameters(), lr=1e-2)
    with_router.mode.token_weights = (1 / 64,)
    losses, agreed = [], []
    for step in range(200):
        x = rows_of(100 + step, 64)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        for router, rows in zip((with_router, without), inputs, strict=True):
            router(rows, full_pool(64)).weights.square().sum().backward()
        assert inputs[0].grad is not None
        assert inputs[1].grad is not None
        assert torch.equal(inputs[0].grad, inputs[1].grad)
        assert with_router.weight.grad is not None
        assert without.weight.grad is not None
        assert torch.equal(with_router.weight.grad, without.weight.grad)
        sums = dict(
            zip(with_router.statistics.NAMES, with_router.statistics.take(x.device), strict=False)
        )
        losses.append(float(sums["causal_loss"]) / 64)
        agreed.append(float(sums["causal_agreed"]) / (64 * 4))
        optimizer.step()
        with_router.zero_grad()
        without.zero_grad()
    # Predicting the base rate alone, a quarter of the tokens per expert, gives 0.562 nats and 0.75.
    assert losses[0] > 0.562
    assert sum(losses[-20:]) / 20 < 0.45
    assert agreed[0] < 0.75
    assert sum(agreed[-20:]) / 20 > 0.79


def test_evaluation_keeps_no_statistics() -> None:
    router = router_of(causal_router=True)
    with torch.no_grad():
        router(rows_of(0, 8), full_pool(8))
    assert router.statistics.values is None
    router(rows_of(0, 8), full_pool(8))
    router(rows_of(1, 8), full_pool(8))
    taken = router.statistics.take(torch.device("cpu"))
    assert taken[0] == 16
    assert taken[-4:].tolist() == [4.0] * 4
