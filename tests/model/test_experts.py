"""Mixtures of experts equal the literal formulas, on one rank and on several."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from mot_megatron.config import Config
from mot_megatron.config_model import ExpertsConfig
from mot_megatron.data.batches import build_micro_batch
from mot_megatron.model.experts import ExpertFeedForward
from mot_megatron.model.layer import FeedForward, Layer
from mot_megatron.model.routing import RoutingMode, RoutingPool, RoutingStatistics
from mot_megatron.model.sharding import ParameterSharding, parts_of
from mot_megatron.model.towers import ParallelLinears
from mot_megatron.parallel.groups import (
    ProcessGroups,
    build_process_groups,
    build_single_process_groups,
)
from tests.model.literal_experts import LiteralExperts, Outcome, expert_choice, top_k
from tests.model.small_models import (
    assert_all_close,
    cut,
    one_sequence,
    random_tokens,
    single_rank_model,
    small_config,
    take_gradients,
)
from tests.ranks import run_ranks

CPU = torch.device("cpu")
HIDDEN, FFN = 16, 24
TOKEN_WEIGHT = 0.37
"""Weight per token of auxiliary losses; any number except one."""


@dataclass(frozen=True)
class Case:
    """A mixture of experts and its pool."""

    settings: dict[str, object]
    num_rows: int = 21
    num_sequences: int = 1
    """Sequences into which the rows are divided, as equally as possible."""
    unfilled: tuple[int, ...] = ()
    """Rows that are padding."""
    seed: int = 0

    @property
    def overrides(self) -> list[str]:
        values = ", ".join(
            f"{key} = {value!r}".replace("True", "true") for key, value in self.settings.items()
        )
        return [
            f"model.hidden_size={HIDDEN}",
            f"model.ffn_hidden_size={FFN}",
            f"model.towers.text.experts={{ {values} }}",
        ]

    def config(self, *parallel: str) -> Config:
        return small_config({"text": "text"}, *self.overrides, *parallel)

    @property
    def experts(self) -> ExpertsConfig:
        (experts,) = self.config().model.experts_of_towers
        assert experts is not None
        return experts

    def weights(self) -> LiteralExperts:
        return LiteralExperts.random(self.seed, self.experts.num_moe_experts, HIDDEN, FFN)

    def pool(self, number: int = 0) -> tuple[torch.Tensor, torch.Tensor, list[bool]]:
        """Return rows [n, h], the gradients of their outputs [n, h], and which rows are tokens."""
        generator = torch.Generator().manual_seed(100 + self.seed + 10 * number)
        rows = [torch.randn(self.num_rows, HIDDEN, generator=generator) for _ in range(2)]
        return rows[0], rows[1], [row not in self.unfilled for row in range(self.num_rows)]

    def sequences(self) -> list[int]:
        """Return the sequence of each row."""
        return [row * self.num_sequences // self.num_rows for row in range(self.num_rows)]


EVERY_LOSS = {"aux_loss_coefficient": 0.5, "z_loss_coefficient": 0.2}


def choice(**settings: object) -> dict[str, object]:
    return {"num_moe_experts": 4, "routing": "expert_choice", **settings}


def topk(**settings: object) -> dict[str, object]:
    return {"num_moe_experts": 4, "routing": "topk", **settings}


CASES = {
    "choice, sigmoid": Case(choice(gate="sigmoid"), num_rows=24, seed=1),
    "choice, softmax": Case(choice(gate="softmax"), num_rows=24, seed=2),
    "choice, uneven pool": Case(choice(), num_rows=22, seed=3),
    "choice, c = 2": Case(choice(gate="softmax", capacity_factor=2.0), num_rows=10, seed=4),
    "choice, c = 0.6": Case(choice(capacity_factor=0.6), num_rows=30, seed=5),
    "choice, all take all": Case(choice(capacity_factor=4.0), num_rows=6, seed=6),
    "choice, unfilled rows": Case(
        choice(capacity_factor=1.5), num_rows=20, unfilled=(0, 5, 6, 18, 19), seed=7
    ),
    "choice, most unfilled": Case(
        choice(gate="softmax", capacity_factor=3.0), num_rows=8, unfilled=(0, 1, 2, 4, 6), seed=8
    ),
    "choice, one token": Case(choice(), num_rows=2, unfilled=(0,), seed=9),
    "choice, no token": Case(choice(causal_router=True), num_rows=2, unfilled=(0, 1), seed=10),
    "choice, no row": Case(choice(causal_router=True), num_rows=0, seed=11),
    "choice, eight experts": Case(
        choice(num_moe_experts=8, capacity_factor=2.0), num_rows=18, seed=12
    ),
    "choice, causal router, z-loss": Case(
        choice(causal_router=True, z_loss_coefficient=0.3), num_rows=18, unfilled=(17,), seed=13
    ),
    "top-1, sigmoid": Case(topk(gate="sigmoid"), num_rows=20, seed=20),
    "top-1, softmax": Case(topk(gate="softmax", topk=1), num_rows=20, seed=21),
    "top-2, sigmoid": Case(topk(gate="sigmoid", topk=2), num_rows=18, seed=22),
    "top-3, softmax": Case(topk(gate="softmax", topk=3), num_rows=18, unfilled=(3,), seed=23),
    "top-2, losses": Case(topk(topk=2, **EVERY_LOSS), num_rows=18, unfilled=(0, 9), seed=24),
    "top-2, losses, sequences": Case(
        topk(topk=2, **EVERY_LOSS), num_rows=30, num_sequences=4, unfilled=(0, 9), seed=32
    ),
    "top-1, losses, a sequence without tokens": Case(
        topk(**EVERY_LOSS), num_rows=12, num_sequences=3, unfilled=(4, 5, 6, 7), seed=33
    ),
    "top-1, losses, capacity": Case(
        topk(gate="softmax", capacity_factor=0.8, **EVERY_LOSS),
        num_rows=20,
        unfilled=(2, 3),
        seed=25,
    ),
    "top-2, losses, capacity": Case(
        topk(topk=2, capacity_factor=0.7, **EVERY_LOSS), num_rows=26, seed=26
    ),
    "top-2, ample capacity": Case(topk(topk=2, capacity_factor=9.0), num_rows=14, seed=27),
    "top-4 of 4": Case(topk(topk=4, gate="softmax"), num_rows=6, seed=28),
    "top-k, no token": Case(topk(topk=2, **EVERY_LOSS), num_rows=2, unfilled=(0, 1), seed=29),
    "top-k, no row": Case(topk(topk=2, capacity_factor=1.0, **EVERY_LOSS), num_rows=0, seed=30),
    "top-2, eight experts": Case(
        topk(num_moe_experts=8, topk=2, capacity_factor=1.0, **EVERY_LOSS), num_rows=24, seed=31
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def build(
    case: Case, groups: ProcessGroups, sequence_parallel: bool, dtype: torch.dtype = torch.float32
) -> ExpertFeedForward:
    """Build this rank's part of the mixture, with the weights of the literal implementation."""
    mode = RoutingMode((TOKEN_WEIGHT,))
    linears = ParallelLinears(groups, sequence_parallel, dtype)
    module = ExpertFeedForward(case.config().model, linears, 0, mode)
    literal = case.weights()
    values = {
        "router.weight": literal.router,
        "router.causal.hidden": literal.causal_hidden,
        "router.causal.output": literal.causal_output,
        **{f"experts.{e}.gate_up": weight for e, weight in enumerate(literal.gate_up)},
        **{f"experts.{e}.down": weight for e, weight in enumerate(literal.down)},
    }
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            for part in parts_of(name, parameter):
                whole = values[part.name]
                parameter[part.rows] = cut(
                    whole, part.sharding, groups.tensor_rank, groups.tensor_size
                )
    return module.to(dtype)


def named_gradients(module: ExpertFeedForward) -> dict[str, torch.Tensor]:
    """Return gradients by name, one entry per expert."""
    found = {}
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        for part in parts_of(name, parameter):
            found[part.name] = parameter.grad[part.rows].clone()
    return found


def literal_outcome(
    case: Case, weights: LiteralExperts, x: torch.Tensor, filled: list[bool]
) -> Outcome:
    if case.experts.routing == "expert_choice":
        return expert_choice(weights, case.experts, x, filled)
    return top_k(weights, case.experts, x, filled, case.sequences())


def literal_objective(case: Case, outcome: Outcome, cotangent: torch.Tensor) -> torch.Tensor:
    """Return the scalar whose gradients the mixture's backward computes."""
    settings = case.experts
    coefficients = {
        "aux_loss": settings.aux_loss_coefficient,
        "z_loss": settings.z_loss_coefficient,
        "causal_loss": float(settings.causal_router),
    }
    auxiliary = sum(coefficients[name] * loss for name, loss in outcome.losses.items())
    return (outcome.outputs * cotangent).sum() + TOKEN_WEIGHT * auxiliary


@dataclass
class Expected:
    """Results of the literal implementation for all pools of a layout."""

    outputs: list[torch.Tensor]
    input_gradients: list[torch.Tensor]
    router_gradients: list[dict[str, torch.Tensor]]
    """One entry per pool, because the engine sums router gradients over pools only later."""
    expert_gradients: dict[str, torch.Tensor]
    """Sums over the pools."""
    statistics: list[torch.Tensor]


def expected_of(case: Case, num_pools: int) -> Expected:
    expected = Expected([], [], [], {}, [])
    for number in range(num_pools):
        weights = case.weights()
        x, cotangent, filled = case.pool(number)
        x.requires_grad_()
        outcome = literal_outcome(case, weights, x, filled)
        # Without tokens the objective does not depend on the rows; the term makes a zero gradient.
        (literal_objective(case, outcome, cotangent) + 0 * x.sum()).backward()
        expected.outputs.append(outcome.outputs.detach())
        assert x.grad is not None
        expected.input_gradients.append(x.grad)
        gradients = weights.gradients()
        expected.router_gradients.append({})
        for name, gradient in gradients.items():
            if name.startswith("router."):
                expected.router_gradients[-1][name] = gradient
            else:
                before = expected.expert_gradients.get(name, torch.zeros_like(gradient))
                expected.expert_gradients[name] = before + gradient
        with torch.no_grad():
            expected.statistics.append(literal_statistics(case, weights, outcome, x, filled))
    return expected


def literal_statistics(
    case: Case, weights: LiteralExperts, outcome: Outcome, x: torch.Tensor, filled: list[bool]
) -> torch.Tensor:
    """Return statistics in the order of RoutingStatistics.NAMES, then the counts per expert.

    The statistics of the causal router are left out.
    """
    tokens = [row for row, used in enumerate(filled) if used]
    taken = {row for rows in outcome.chosen for row in rows}
    entropy = 0.0
    for row in tokens:
        p = torch.softmax(weights.router @ x[row], 0)
        entropy -= float((p * p.log()).sum())
    balancing = outcome.losses.get("aux_loss") if case.experts.aux_loss_coefficient else None
    return torch.tensor(
        [
            len(tokens),
            len(set(tokens) - taken),
            entropy,
            0.0 if balancing is None else float(balancing),
            float(outcome.losses["z_loss"]),
            *(len(rows) for rows in outcome.chosen),
        ]
    )


def without_causal(statistics: torch.Tensor) -> torch.Tensor:
    return torch.cat((statistics[:5], statistics[len(RoutingStatistics.NAMES) :]))


@dataclass
class OfRank:
    """What one rank computed on its rows of its pool."""

    outputs: torch.Tensor
    input_gradient: torch.Tensor
    gradients: dict[str, torch.Tensor]
    statistics: torch.Tensor


def on_this_rank(case: Case, groups: ProcessGroups, sequence_parallel: bool) -> OfRank:
    """Run this rank's part: one pool per data-parallel rank, in equal chunks per tensor rank."""
    module = build(case, groups, sequence_parallel)
    x, cotangent, filled = case.pool(groups.data_rank)
    parts, own = (groups.tensor_size, groups.tensor_rank) if sequence_parallel else (1, 0)
    # Inputs and gradients are not contiguous.
    x, cotangent = (rows.T.contiguous().T.chunk(parts)[own] for rows in (x, cotangent))
    x = x.detach().requires_grad_()
    pool = RoutingPool(
        torch.tensor(filled, dtype=torch.bool).chunk(parts)[own],
        sum(filled),
        torch.tensor(case.sequences(), dtype=torch.int64).chunk(parts)[own],
        case.num_sequences,
    )
    outputs = module(x, pool)
    outputs.backward(cotangent)
    assert x.grad is not None
    statistics = module.router.statistics.take(CPU)
    assert not module.router.statistics.take(CPU).any()
    return OfRank(outputs.detach(), x.grad, named_gradients(module), statistics)


def check(case: Case, of_ranks: list[OfRank], tensor: int) -> None:
    """Compare all ranks, tensor rank fastest; the experts are split over the pools."""
    num_pools = len(of_ranks) // tensor
    expected = expected_of(case, num_pools)
    share = case.experts.num_moe_experts // num_pools
    for rank, actual in enumerate(of_ranks):
        pool, own = divmod(rank, tensor)
        assert_all_close(
            {"outputs": actual.outputs, "x": actual.input_gradient},
            {
                "outputs": expected.outputs[pool].chunk(tensor)[own],
                "x": expected.input_gradients[pool].chunk(tensor)[own],
            },
            1e-5,
        )
        wanted = {
            name: gradient
            for name, gradient in expected.router_gradients[pool].items()
            if case.experts.causal_router or "causal" not in name
        }
        for expert in range(share * pool, share * (pool + 1)):
            for kind, shape in (("gate_up", (2, FFN, HIDDEN)), ("down", (HIDDEN, FFN))):
                name = f"experts.{expert}.{kind}"
                whole = expected.expert_gradients[name]
                wanted[name] = cut(whole, ParameterSharding(shape, shard_dim=1), own, tensor)
        assert_all_close(actual.gradients, wanted, 1e-5)
    for pool, statistics in enumerate(expected.statistics):
        parts = [actual.statistics for actual in of_ranks[pool * tensor : (pool + 1) * tensor]]
        found = without_causal(torch.stack(parts).sum(0))
        torch.testing.assert_close(found, statistics, rtol=1e-5, atol=1e-4)


@every_case
def test_one_rank_equals_the_literal_formulas(case: Case) -> None:
    groups = build_single_process_groups(CPU)
    check(case, [on_this_rank(case, groups, sequence_parallel=False)], tensor=1)


def all_cases(tensor: int, expert: int) -> list[OfRank]:
    groups = build_process_groups(tensor, CPU, expert_model_parallel_size=expert)
    return [on_this_rank(case, groups, sequence_parallel=tensor > 1) for case in divisible(tensor)]


def divisible(tensor: int) -> list[Case]:
    return [case for case in CASES.values() if case.num_rows % tensor == 0]


@pytest.mark.parametrize(("tensor", "expert"), [(1, 2), (2, 1), (2, 2), (1, 4)])
def test_expert_and_tensor_parallel_ranks_equal_the_literal_formulas(
    tensor: int, expert: int
) -> None:
    of_ranks = run_ranks(all_cases, tensor * expert, tensor, expert)
    for case, *outcomes in zip(divisible(tensor), *of_ranks, strict=True):
        check(case, outcomes, tensor)


THREE_TOWERS = {"text": "text", "image": "image", "speech": "speech"}


def test_one_expert_with_a_softmax_gate_equals_a_plain_tower() -> None:
    """The gate is one and the expert takes every token, so the model equals one without experts."""
    tokens = random_tokens(3, list(THREE_TOWERS), (1, 1, 1))
    plain_config = small_config(THREE_TOWERS)
    plain = single_rank_model(plain_config)
    batch = tokens.micro_batch(plain_config)
    losses = plain(batch)
    losses[0].backward()
    weights = {name: p.detach().clone() for name, p in plain.named_parameters()}
    gradients = take_gradients(plain)
    for routing in ("expert_choice", "topk"):
        settings = f'{{ num_moe_experts = 1, gate = "softmax", routing = "{routing}" }}'
        config = small_config(THREE_TOWERS, f"model.towers.text.experts={settings}")
        hybrid = single_rank_model(config)
        mine = {name: name for name, _ in hybrid.named_parameters() if ".router." not in name}
        for name in mine:
            for kind in ("gate_up", "down"):
                if name.endswith(f".experts.{kind}"):
                    mine[name] = name.replace(f".experts.{kind}", f".{kind}.linear.weight")
        assert set(mine.values()) == set(weights)
        with torch.no_grad():
            for name, parameter in hybrid.named_parameters():
                if name in mine:
                    parameter.copy_(weights[mine[name]])
        outputs = hybrid(batch)
        outputs[0].backward()
        for output, expected in zip(outputs, losses, strict=True):
            torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)
        found = take_gradients(hybrid)
        assert all(found[name].abs().max() < 1e-6 for name in found if ".router." in name)
        assert_all_close({old: found[new] for new, old in mine.items()}, gradients, 1e-5)


@pytest.mark.parametrize("c", [1.0, 2.5, 4.0])
def test_equal_experts_with_sigmoid_gates_scale_a_plain_network(c: float) -> None:
    """Four equal experts give (sum of the gates of the experts that took the token) * ffn(x)."""
    case = Case(choice(capacity_factor=c), num_rows=24, seed=41)
    groups = build_single_process_groups(CPU)
    linears = ParallelLinears(groups, sequence_parallel=False, dtype=torch.float32)
    plain = FeedForward(case.config().model, linears)
    mixture = build(case, groups, sequence_parallel=False)
    literal = case.weights()
    with torch.no_grad():
        for linear, weight in ((plain.gate_up, literal.gate_up), (plain.down, literal.down)):
            linear.linear.load_state_dict({"weight": weight[0]}, strict=False)
        mixture.experts.gate_up.copy_(literal.gate_up[0].repeat(4, 1))
        mixture.experts.down.copy_(literal.down[0].repeat(4, 1))
    x, _, _ = case.pool()
    sigmoids = torch.sigmoid(x @ literal.router.T)
    share = int(c * 24 / 4)
    # The threshold of an expert is its share-th largest gate.
    taken = sigmoids >= sigmoids.sort(0, descending=True).values[share - 1]
    assert taken.sum(0).tolist() == [share] * 4
    pool = one_sequence(torch.ones(24, dtype=torch.bool))
    expected = (sigmoids * taken).sum(-1, keepdim=True) * plain(x, pool)
    outputs = mixture(x, pool)
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-5)
    assert bool((taken.sum(-1) == 0).any()) == (c < 4)
    assert torch.equal(outputs.abs().sum(-1) == 0, ~taken.any(-1))


@pytest.mark.parametrize("routing", ["expert_choice", "topk"])
def test_experts_of_a_tower_ignore_tokens_of_other_towers(routing: str) -> None:
    settings = f'{{ num_moe_experts = 4, routing = "{routing}", capacity_factor = 0.5 }}'
    config = small_config(THREE_TOWERS, f"model.towers.image.experts={settings}")
    model = single_rank_model(config)
    batch = random_tokens(5, list(THREE_TOWERS), (1, 2, 1)).micro_batch(config)
    pools = model.layer_inputs(batch).pools
    layer = model.layers["0"]
    assert isinstance(layer, Layer)
    streams = [[torch.randn(len(p.filled), 32) for p in pools] for _ in range(2)]
    streams[1][1] = streams[0][1]
    first, other = (layer.feed_forward(stream, pools) for stream in streams)
    assert torch.equal(first[1], other[1])
    assert not torch.equal(first[0], other[0])
    (mixture,) = (part for part in layer.modules() if isinstance(part, ExpertFeedForward))
    counts = mixture.router.statistics.take(CPU)
    assert counts[0] == 2 * batch.tower_filled[1] < 2 * sum(batch.tower_filled)


def test_sequence_padding_does_not_change_hidden_states() -> None:
    """The modality of padding tokens does not change any document's hidden states."""
    settings = "{ num_moe_experts = 4, causal_router = true }"
    names = list(THREE_TOWERS)
    config = small_config(
        THREE_TOWERS, *(f"model.towers.{name}.experts={settings}" for name in names)
    )
    model = single_rank_model(config)
    tokens = random_tokens(6, names, (1, 1, 1))
    filled = np.array([15, 20])
    documents = tokens.document_ids.copy()
    for row, end in enumerate(filled):
        documents[row, end:] = 1000
    used = (np.arange(24) < filled[:, None]).ravel()
    found = []
    for padding in (3, 17, 70, 110):  # text, text, image, speech
        ids = np.where(used.reshape(2, 24), tokens.token_ids, padding)
        batch = build_micro_batch(
            ids,
            documents,
            tokens.modality_of_id,
            (0, 1, 2),
            num_towers=3,
            filled_tokens=filled,
        )
        with torch.no_grad():
            rows = torch.cat(model.hidden_states(batch))
        found.append(rows[batch.ungroup_index][torch.from_numpy(used)])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-5)
