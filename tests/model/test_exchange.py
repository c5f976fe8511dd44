"""The exchange around attention equals plain indexing; a step runs no other collectives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from mot_megatron.data.batches import build_micro_batch
from mot_megatron.data.modality_shards import ModalityShard
from mot_megatron.model.exchange import HeadSlices, ModalityExchange
from mot_megatron.model.micro_batch import MicroBatch
from mot_megatron.model.model import MixtureOfTransformers
from mot_megatron.parallel.groups import build_process_groups
from mot_megatron.parallel.placement import Placement
from tests.model.small_models import random_tokens, small_config
from tests.ranks import run_ranks

NAMES = ["text", "image", "speech"]
HEAD_SIZE = 4


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(2, 8))
def test_query_heads_stay_with_their_key_value_heads(
    heads_per_rank: int, num_groups: int, num_ranks: int
) -> None:
    num_heads = heads_per_rank * num_ranks
    assume(num_heads % num_groups == 0)
    assume(num_groups % num_ranks == 0 or num_ranks % num_groups == 0)
    slices = HeadSlices.split(num_heads, num_groups, num_ranks)
    assert slices.are_split
    taken = [head for part in slices.queries for head in range(num_heads)[part]]
    assert taken == list(range(num_heads))
    for queries, keys in zip(slices.queries, slices.keys, strict=True):
        local_groups = range(num_groups)[keys]
        # Each query head must find its own key-value head, by the grouping of the whole model.
        per_group = heads_per_rank // len(local_groups)
        for place, head in enumerate(range(num_heads)[queries]):
            assert local_groups[place // per_group] == head // (num_heads // num_groups)


def test_head_slices_of_the_sequence_exchange_are_whole() -> None:
    assert HeadSlices.whole(4, 2, 3) == HeadSlices((slice(0, 4),) * 3, (slice(0, 2),) * 3)
    assert not HeadSlices.whole(4, 2, 3).are_split


@dataclass(frozen=True)
class Case:
    """Head counts, a placement and the modalities of the batch."""

    exchange: str
    heads: int
    groups: int
    shares: tuple[tuple[float, ...], ...]
    mix: tuple[float, float, float] = (3, 2, 1)
    slot_multiple: int = 1

    @property
    def placement(self) -> Placement:
        return Placement(self.shares)

    @property
    def num_positions(self) -> int:
        """Positions of the modality group: two sequences of 10 per rank."""
        return 2 * self.placement.num_ranks * 10

    @property
    def head_slices(self) -> HeadSlices:
        make = HeadSlices.split if self.exchange == "heads" else HeadSlices.whole
        return make(self.heads, self.groups, self.placement.num_ranks)

    def micro_batch(self, rank: int) -> MicroBatch:
        shape = (2 * self.placement.num_ranks, 10)
        tokens = random_tokens(5, NAMES, self.mix, shape)
        return build_micro_batch(
            tokens.token_ids,
            tokens.document_ids,
            tokens.modality_of_id,
            tuple(range(3)) if self.placement.num_towers == 3 else (0, 1, 0),
            num_towers=self.placement.num_towers,
            slot_multiple=self.slot_multiple,
            shard=ModalityShard(self.placement, rank, self.exchange),  # type: ignore[arg-type]
        )

    def attended(self, rank: int) -> slice:
        if self.exchange == "heads":
            return slice(0, self.num_positions)
        own = self.num_positions // self.placement.num_ranks
        return slice(rank * own, (rank + 1) * own)


TEXT_AND_IMAGE = ((1.0, 0.0), (0.0, 1.0))
TWO_AND_ONE = ((1.0, 0.0, 0.4), (0.0, 1.0, 0.6))
SPLIT = ((0.5, 0.0), (0.5, 0.0), (0.0, 1.0))
CROSSED = ((0.2, 1.0, 0.0), (0.8, 0.0, 0.5), (0.0, 0.0, 0.5))
CASES = {
    2: [
        Case("sequence", 4, 2, TEXT_AND_IMAGE),
        Case("sequence", 3, 3, TWO_AND_ONE, slot_multiple=4),
        Case("sequence", 4, 1, TEXT_AND_IMAGE, (1, 0, 1)),  # no rows on the second rank
        Case("heads", 4, 4, TEXT_AND_IMAGE, slot_multiple=2),
        Case("heads", 4, 1, TWO_AND_ONE),
        Case("heads", 6, 2, TEXT_AND_IMAGE, (0, 1, 0)),  # no rows on the first rank
    ],
    3: [
        Case("sequence", 4, 2, SPLIT, slot_multiple=2),
        Case("sequence", 2, 1, CROSSED, (1, 0, 0)),  # no rows on the third rank
        Case("heads", 6, 3, SPLIT),
        Case("heads", 3, 1, CROSSED, slot_multiple=4),
        Case("heads", 6, 6, CROSSED, (0, 0, 1)),
    ],
}


class Reference:
    """Every rank's inputs and gradients in sequence order, the same on all ranks."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.slices = case.head_slices
        generator = torch.Generator().manual_seed(3)

        def rows(count: int, heads: int) -> torch.Tensor:
            return torch.randn(count, heads, HEAD_SIZE, generator=generator, dtype=torch.float64)

        size, ranks = case.num_positions, range(case.placement.num_ranks)
        self.inputs = [rows(size, heads) for heads in (case.heads, case.groups, case.groups)]
        self.chosen = (self.slices.queries, self.slices.keys, self.slices.keys)
        # The output of attention, and every rank's gradients of the inputs of attention, for all
        # positions and heads; a rank uses the part for which it computes attention.
        self.outputs = rows(size, case.heads)
        self.input_gradients = [
            [rows(size, whole.shape[1]) for whole in self.inputs] for _ in ranks
        ]
        self.row_gradients = rows(size, case.heads)

    def attended(self, whole: torch.Tensor, chosen: Sequence[slice], rank: int) -> torch.Tensor:
        return whole[self.case.attended(rank), chosen[rank]]

    def summed_gradient(self, part: int) -> torch.Tensor:
        """Return the gradient of q, k or v at every position, summed over the ranks."""
        total = torch.zeros_like(self.inputs[part])
        for rank, gradients in enumerate(self.input_gradients):
            place = self.case.attended(rank), self.chosen[part][rank]
            total[place] += gradients[part][place]
        return total


def tower_slices(
    whole: torch.Tensor, batch: MicroBatch, towers: Sequence[int], padding: float
) -> list[torch.Tensor]:
    """Return values of positions [t, ...] in the rank's grouped order, ``padding`` elsewhere."""
    stream = whole[batch.group_index]
    stream[batch.padding_slots] = padding
    by_tower = stream.split(batch.tower_slots)
    return [by_tower[tower] for tower in towers]


def strided(values: torch.Tensor) -> torch.Tensor:
    """Return the same values, stored with heads outermost and with gaps between them."""
    moved = torch.full((*values.transpose(0, 1).shape[:2], 2 * HEAD_SIZE), torch.nan).double()
    view = moved.transpose(0, 1)[..., :HEAD_SIZE]
    view.copy_(values)
    assert not values.numel() or not view.is_contiguous()
    return view


def compare_with_indexing(number: int, world_size: int) -> None:
    """Run one case forward and backward on this rank; the modality group is the world."""
    case, rank = CASES[world_size][number], dist.get_rank()
    batch, towers = case.micro_batch(rank), case.placement.towers(rank)
    group = dist.group.WORLD
    assert group is not None
    exchange = ModalityExchange.of(case.head_slices, towers, batch, group)
    reference = Reference(case)

    # After a projection, padding may contain anything; none of it may be sent.
    leaves = [
        [strided(part).requires_grad_() for part in tower_slices(whole, batch, towers, torch.nan)]
        for whole in reference.inputs
    ]
    found = exchange.to_attention(*leaves)
    for part, whole, chosen in zip(found, reference.inputs, reference.chosen, strict=True):
        assert torch.equal(part, reference.attended(whole, chosen, rank))
    gradients = [
        strided(reference.attended(whole, chosen, rank))
        for whole, chosen in zip(reference.input_gradients[rank], reference.chosen, strict=True)
    ]
    torch.autograd.backward(found, gradients)
    for part, slices in enumerate(leaves):
        expected = tower_slices(reference.summed_gradient(part), batch, towers, 0.0)
        for leaf, gradient in zip(slices, expected, strict=True):
            torch.testing.assert_close(leaf.grad, gradient, rtol=1e-12, atol=1e-12)

    queries = reference.chosen[0]
    output = strided(reference.attended(reference.outputs, queries, rank)).requires_grad_()
    rows = exchange.from_attention(output)
    for part, expected in zip(
        rows, tower_slices(reference.outputs, batch, towers, 0.0), strict=True
    ):
        assert torch.equal(part, expected.flatten(1))
    gradients = tower_slices(reference.row_gradients, batch, towers, torch.nan)
    torch.autograd.backward(rows, [strided(gradient).flatten(1) for gradient in gradients])
    expected = reference.attended(reference.row_gradients, queries, rank)
    assert output.grad is not None
    assert torch.equal(output.grad, expected)
    check_expanded_and_missing_gradients(case, exchange, leaves, output)


def check_expanded_and_missing_gradients(
    case: Case,
    exchange: ModalityExchange,
    leaves: list[list[torch.Tensor]],
    output: torch.Tensor,
) -> None:
    """Send gradients with stride zero (of a sum) and a missing gradient (of an unused output)."""
    for slices in (*leaves, [output]):
        for leaf in slices:
            leaf.grad = None
    queries, _, values = exchange.to_attention(*leaves)
    (queries.sum() + values.sum()).backward()
    torch.stack([part.sum() for part in exchange.from_attention(output)]).sum().backward()
    assert output.grad is not None
    assert torch.equal(output.grad, torch.ones_like(output))
    copies = sum(part == case.head_slices.keys[0] for part in case.head_slices.keys)
    copies = copies if case.exchange == "heads" else 1
    for slices, total in zip(leaves, (1, 0, copies), strict=True):
        for leaf, tokens in zip(slices, exchange.tokens, strict=True):
            assert leaf.grad is not None
            assert (leaf.grad[:tokens] == total).all()
            assert (leaf.grad[tokens:] == 0).all()


def compare_all_with_indexing(world_size: int) -> list[int]:
    """Compare all cases with the reference; return this rank's number of tokens in each."""
    for number in range(len(CASES[world_size])):
        compare_with_indexing(number, world_size)
    rank = dist.get_rank()
    return [sum(case.micro_batch(rank).tower_tokens) for case in CASES[world_size]]


@pytest.mark.parametrize("world_size", [2, 3])
def test_exchange_equals_indexing_of_the_whole_batch(world_size: int) -> None:
    tokens = run_ranks(compare_all_with_indexing, world_size, world_size)
    for case, counts in zip(CASES[world_size], zip(*tokens, strict=True), strict=True):
        assert sum(counts) == case.num_positions
    assert any(0 in counts for counts in tokens)  # some rank had nothing to send


@dataclass(frozen=True)
class Sent:
    """A collective over more than one rank."""

    name: str
    ranks: int
    sent_bytes: int
    received_bytes: int


class Collectives(TorchDispatchMode):
    """Record every collective of this thread, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[Sent] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._record(func, args)
        return func(*args, **(kwargs or {}))

    def _record(self, func: Any, args: Any) -> None:
        groups = [arg for arg in args if isinstance(arg, torch.ScriptObject)]
        size = dist.ProcessGroup.unbox(groups[0]).size()
        name = func._schema.name.removeprefix("c10d::")
        if size == 1:  # megatron's loss reduces over its tensor-parallel group at any size
            return
        if name == "alltoall_base_":
            self.sent.append(Sent(name, size, args[1].nbytes, args[0].nbytes))
        else:
            self.sent.append(Sent(name, size, 0, 0))


MODES = [
    (exchange, groups, recompute)
    for exchange, groups in (("sequence", 2), ("heads", 4), ("heads", 1))
    for recompute in ("none", "selective", "full")
]


def record_step(mode: tuple[str, int, str], groups: Any) -> dict[str, Any]:
    """Return the collectives of forward and backward, and the row counts of the batch."""
    exchange, num_groups, recompute = mode
    config = small_config(
        {"text": "text", "image": "image", "speech": "text"},
        "parallel.modality_parallel_size=2",
        f"parallel.attention_exchange={exchange}",
        f"model.num_query_groups={num_groups}",
        f"training.recompute={recompute}",
    )
    model = MixtureOfTransformers(config, groups)
    tokens = random_tokens(2, NAMES, (3, 2, 1), (2, 24))
    batch = build_micro_batch(
        tokens.token_ids,
        tokens.document_ids,
        tokens.modality_of_id,
        config.model.towers_of_modalities,
        num_towers=2,
        shard=ModalityShard(groups.placement, groups.modality_rank, exchange),  # type: ignore[arg-type]
    )
    with Collectives() as forward:
        loss, _ = model(batch)
    with Collectives() as backward:
        loss.backward()
    return {
        "forward": forward.sent,
        "backward": backward.sent,
        "rows": sum(batch.tower_tokens),
        "attended": batch.positions.numel(),
    }


def record_steps() -> list[dict[str, Any]]:
    groups = build_process_groups(
        1, torch.device("cpu"), placement=Placement(((1.0, 0.0), (0.0, 1.0)))
    )
    return [record_step(mode, groups) for mode in MODES]


def test_a_layer_runs_two_all_to_alls_forward_and_two_backward() -> None:
    d, layers, fp32 = 8, 2, 4  # the small model: head size 32 / 4, two layers, 4 bytes
    by_rank = run_ranks(record_steps, 2)
    for (exchange, groups, recompute), *recorded in zip(MODES, *by_rank, strict=True):
        for step in recorded:
            if exchange == "sequence":
                sent_rows, heads, key_values = step["rows"], 4, groups
                assert step["attended"] == 24
            else:  # every row goes to both ranks: half of the heads, at least one key-value head
                sent_rows, heads, key_values = 2 * step["rows"], 2, max(groups // 2, 1)
                assert step["attended"] == 48
            qkv = (heads + 2 * key_values) * d * fp32  # bytes per row
            output = heads * d * fp32
            here, there = sent_rows, step["attended"]

            def all_to_all(rows_out: int, rows_in: int, width: int) -> Sent:
                return Sent("alltoall_base_", 2, rows_out * width, rows_in * width)

            layer = [all_to_all(here, there, qkv), all_to_all(there, here, output)]
            layer_backward = [all_to_all(here, there, output), all_to_all(there, here, qkv)]
            assert step["forward"] == layer * layers
            # Full recomputation repeats a layer's exchange right before its backward; selective
            # recomputation, of the attention core only, does not.
            again = layer if recompute == "full" else []
            assert step["backward"] == (again + layer_backward) * layers
        first, second = recorded
        assert first["rows"] + second["rows"] == 48
        for phase in ("forward", "backward"):
            # The ranks run the same collectives in the same order, so sent equals received.
            for together in zip(first[phase], second[phase], strict=True):
                assert sum(s.sent_bytes for s in together) == sum(
                    s.received_bytes for s in together
                )
