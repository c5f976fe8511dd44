"""The shards of a modality group's micro-batch, compared with plain Python over its positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mot_megatron.data.batches import build_micro_batch
from mot_megatron.data.modality_shards import ModalityShard
from mot_megatron.model.micro_batch import NO_LABEL, ExchangePlan, MicroBatch
from mot_megatron.parallel.placement import Placement

IDS_PER_MODALITY = 5
Exchange = Literal["sequence", "heads"]


@dataclass(frozen=True)
class Case:
    """The sequences of a modality group with its placement and exchange."""

    token_ids: np.ndarray
    document_ids: np.ndarray
    filled: np.ndarray
    num_modalities: int
    towers_of_modalities: tuple[int, ...]
    placement: Placement
    exchange: Exchange
    slot_multiple: int

    def shards(self) -> list[MicroBatch]:
        """Return the micro-batch of each rank of the group."""
        return [
            build_micro_batch(
                self.token_ids,
                self.document_ids,
                np.repeat(np.arange(self.num_modalities, dtype=np.int8), IDS_PER_MODALITY),
                self.towers_of_modalities,
                num_towers=self.placement.num_towers,
                slot_multiple=self.slot_multiple,
                filled_tokens=self.filled,
                shard=ModalityShard(self.placement, rank, self.exchange),
            )
            for rank in range(self.placement.num_ranks)
        ]

    def attended(self, rank: int) -> range:
        """Return the positions of the group for which a rank runs attention."""
        if self.exchange == "heads":
            return range(self.token_ids.size)
        own = self.token_ids.size // self.placement.num_ranks
        return range(rank * own, (rank + 1) * own)


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    """Every rank with at least one tower, every tower on at least one rank."""
    num_ranks, num_towers = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    pairs = {(rank, draw(st.integers(0, num_towers - 1))) for rank in range(num_ranks)}
    pairs |= {(draw(st.integers(0, num_ranks - 1)), tower) for tower in range(num_towers)}
    weights = {pair: draw(st.integers(1, 5)) for pair in sorted(pairs)}
    totals = [sum(w for (_, t), w in weights.items() if t == tower) for tower in range(num_towers)]
    return Placement(
        tuple(
            tuple(weights.get((rank, tower), 0) / totals[tower] for tower in range(num_towers))
            for rank in range(num_ranks)
        )
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Modalities may be absent from the batch or from a sequence, and towers from the map."""
    placement = draw(placements())
    num_modalities = draw(st.integers(1, 4))
    towers = tuple(draw(st.integers(0, placement.num_towers - 1)) for _ in range(num_modalities))
    sequences = placement.num_ranks * draw(st.integers(1, 2))
    length = draw(st.integers(1, 12))
    generator = np.random.default_rng(draw(st.integers(0, 2**31)))
    modality = np.stack(
        [
            generator.choice(generator.integers(0, num_modalities, 2), length)
            for _ in range(sequences)
        ]
    )
    token_ids = modality * IDS_PER_MODALITY + generator.integers(
        0, IDS_PER_MODALITY, modality.shape
    )
    document_ids = np.cumsum(generator.random((sequences, length)) < 0.3, axis=1)
    filled = generator.integers(0, length + 1, sequences)
    for row, end in enumerate(filled):
        document_ids[row, end:] = length + 1  # the rest is a document of its own
    return Case(
        token_ids,
        document_ids,
        filled,
        num_modalities,
        towers,
        placement,
        draw(st.sampled_from(["sequence", "heads"])),
        draw(st.sampled_from([1, 2, 4])),
    )


@dataclass(frozen=True)
class Token:
    """The data of one position of the group."""

    token_id: int
    label: int
    label_modality: int
    tower: int
    modality: int
    depth: int
    """Position in its document."""
    used: bool
    """Whether a document covers the position."""


def plain_tokens(case: Case) -> list[Token]:
    """Return all positions of the group's sequences in order."""
    tokens: list[Token] = []
    for ids, documents, filled in zip(
        case.token_ids.tolist(), case.document_ids.tolist(), case.filled.tolist(), strict=True
    ):
        depth = 0
        for position, token_id in enumerate(ids):
            new = position > 0 and documents[position] != documents[position - 1]
            depth = 0 if position == 0 or new else depth + 1
            following = position + 1
            labeled = following < filled and documents[following] == documents[position]
            label = ids[following] if labeled else NO_LABEL
            modality = token_id // IDS_PER_MODALITY
            tokens.append(
                Token(
                    token_id,
                    label,
                    label // IDS_PER_MODALITY if labeled else 0,
                    case.towers_of_modalities[modality],
                    modality,
                    depth,
                    used=position < filled,
                )
            )
    return tokens


def rows_by_tower(batch: MicroBatch) -> list[list[int]]:
    """Return, per tower, the slots of a rank's stream that contain tokens."""
    begins = [0, *accumulate(batch.tower_slots)]
    return [
        list(range(begin, begin + tokens))
        for begin, tokens in zip(begins[:-1], batch.tower_tokens, strict=True)
    ]


@given(cases())
def test_every_token_is_on_one_rank(case: Case) -> None:
    tokens = plain_tokens(case)
    seen: list[int] = []
    for rank, batch in enumerate(case.shards()):
        for tower, slots in enumerate(rows_by_tower(batch)):
            positions = batch.group_index[slots].tolist()
            assert positions == sorted(positions)
            for slot, position in zip(slots, positions, strict=True):
                token = tokens[position]
                assert token.tower == tower
                assert batch.token_ids[slot] == token.token_id
                assert batch.labels[slot] == token.label
                assert batch.label_modalities[slot] == token.label_modality
            if rank not in case.placement.holders(tower):
                assert not slots
            seen += positions
    assert sorted(seen) == list(range(len(tokens)))


@given(cases())
def test_split_tower_is_divided_by_its_shares(case: Case) -> None:
    tokens, shards = plain_tokens(case), case.shards()
    for tower in range(case.placement.num_towers):
        of_tower = [position for position, token in enumerate(tokens) if token.tower == tower]
        parts = [shard.group_index[rows_by_tower(shard)[tower]].tolist() for shard in shards]
        assert [position for part in parts for position in part] == of_tower
        for part, shares in zip(parts, case.placement.shares, strict=True):
            assert abs(len(part) - len(of_tower) * shares[tower]) <= 1 + 1e-6


@given(cases())
def test_padding_slots_follow_the_tokens_of_each_tower(case: Case) -> None:
    for batch in case.shards():
        for slots, tokens in zip(batch.tower_slots, batch.tower_tokens, strict=True):
            assert slots % case.slot_multiple == 0
            assert 0 <= slots - tokens < case.slot_multiple
        filled = {slot for slots in rows_by_tower(batch) for slot in slots}
        padding = [slot for slot in range(len(batch.token_ids)) if slot not in filled]
        assert batch.padding_slots.tolist() == padding
        assert sum(batch.tower_slots) == len(batch.token_ids) == len(batch.group_index)
        assert (batch.labels[padding] == NO_LABEL).all()
        for values in (batch.token_ids, batch.label_modalities, batch.group_index):
            assert (values[padding] == 0).all()


@given(cases())
def test_counts_of_ranks_sum_to_the_counts_of_the_group(case: Case) -> None:
    tokens, shards = plain_tokens(case), case.shards()

    def summed(counts: Sequence[Sequence[int]]) -> list[int]:
        return [sum(column) for column in zip(*counts, strict=True)]

    modalities, towers = range(case.num_modalities), range(case.placement.num_towers)
    used = [token.modality for token in tokens if token.used]
    labels = [token.label_modality for token in tokens if token.label != NO_LABEL]
    held = [token.tower for token in tokens]
    assert summed([b.modality_tokens for b in shards]) == [used.count(m) for m in modalities]
    assert summed([b.modality_labels for b in shards]) == [labels.count(m) for m in modalities]
    assert summed([b.tower_tokens for b in shards]) == [held.count(k) for k in towers]
    of_ranks = tuple(sum(b.modality_labels) for b in shards)
    assert all(plan_of(b).rank_labels == of_ranks for b in shards)
    assert sum(b.attended_pairs for b in shards) == sum(token.depth + 1 for token in tokens)


@given(cases())
def test_attention_uses_the_positions_of_the_ranks_sequences(case: Case) -> None:
    tokens = plain_tokens(case)
    for rank, batch in enumerate(case.shards()):
        attended = case.attended(rank)
        assert batch.positions.tolist() == [tokens[position].depth for position in attended]
        length = case.token_ids.shape[1]
        places = [position % length for position in attended]
        depths = [tokens[position].depth for position in attended]
        expected = [place - depth for place, depth in zip(places, depths, strict=True)]
        assert batch.visible_from.ravel().tolist() == expected
        assert batch.visible_to.ravel().tolist() == [place + 1 for place in places]
        assert batch.visible_from.shape[1] == length


def plan_of(batch: MicroBatch) -> ExchangePlan:
    assert batch.exchange is not None
    return batch.exchange


def sent_rows(case: Case, batch: MicroBatch) -> list[list[int]]:
    """Return, per receiving rank, the positions of the rows that the rank's plan sends to it."""
    plan = plan_of(batch)
    sent: list[list[int]] = [[] for _ in range(case.placement.num_ranks)]
    for slots, counts in zip(rows_by_tower(batch), plan.send_rows, strict=True):
        positions = batch.group_index[slots].tolist()
        if case.exchange == "heads":
            assert counts == (len(positions),) * len(sent)
        begin = 0
        for target, count in zip(sent, counts, strict=True):
            target += positions[begin : begin + count]
            if case.exchange == "sequence":
                begin += count
        if case.exchange == "sequence":
            assert begin == len(positions)
    return sent


@given(cases())
def test_sent_rows_equal_received_rows(case: Case) -> None:
    plans = [plan_of(batch) for batch in case.shards()]
    for sender, plan in enumerate(plans):
        assert len(plan.send_rows) == case.placement.num_towers
        for receiver, rows in enumerate(zip(*plan.send_rows, strict=True)):
            assert sum(rows) == plans[receiver].receive_rows[sender]
    for rank, plan in enumerate(plans):
        assert sum(plan.receive_rows) == len(case.attended(rank))


@given(cases())
def test_exchange_moves_rows_to_their_positions_and_back(case: Case) -> None:
    shards = case.shards()
    sent = [sent_rows(case, batch) for batch in shards]
    for rank, batch in enumerate(shards):
        plan = plan_of(batch)
        arrived = [row for rows in sent for row in rows[rank]]
        assert [arrived[index] for index in plan.position_index] == list(case.attended(rank))
        # Return trip: positions in order of arrival, split by the rank they came from.
        returned = [case.attended(rank)[index] for index in plan.arrival_index]
        bounds = [0, *accumulate(plan.receive_rows)]
        for sender, (begin, end) in enumerate(pairwise(bounds)):
            assert returned[begin:end] == sent[sender][rank]


@pytest.mark.parametrize("exchange", ["sequence", "heads"])
def test_hand_computed_group(exchange: Exchange) -> None:
    # Two ranks with one sequence each; ids 0..4 are tower 0's, 5..9 tower 1's. Rank 0 holds tower 0
    # and a third of tower 1, whose tokens are at positions 1, 2 and 6.
    case = Case(
        np.array([[0, 5, 6, 1], [2, 3, 7, 4]]),
        np.array([[0, 0, 0, 0], [0, 0, 1, 1]]),
        np.array([4, 4]),
        2,
        (0, 1),
        Placement(((1.0, 1 / 3), (0.0, 2 / 3))),
        exchange,
        2,
    )
    first, second = case.shards()
    assert first.tower_tokens == (5, 1)
    assert first.tower_slots == (6, 2)
    assert first.group_index.tolist() == [0, 3, 4, 5, 7, 0, 1, 0]
    assert first.padding_slots.tolist() == [5, 7]
    assert second.tower_tokens == (0, 2)
    assert second.token_ids.tolist() == [6, 7]
    assert second.labels.tolist() == [1, 4]
    # 1+2+3+4 in the first sequence and 2 * (1+2) in the second; or half of all in half the heads.
    expected = (10, 6) if exchange == "sequence" else (8, 8)
    assert (first.attended_pairs, second.attended_pairs) == expected
    if exchange == "sequence":
        assert plan_of(first).send_rows == ((2, 3), (1, 0))
        assert plan_of(first).receive_rows == (3, 1)
        assert plan_of(first).arrival_index.tolist() == [0, 3, 1, 2]
        assert plan_of(second).send_rows == ((0, 0), (1, 1))
        assert plan_of(second).receive_rows == (3, 1)
        assert plan_of(second).arrival_index.tolist() == [0, 1, 3, 2]
        assert second.positions.tolist() == [0, 1, 0, 1]
    else:
        for plan in (plan_of(first), plan_of(second)):
            assert plan.receive_rows == (6, 2)
            assert plan.arrival_index.tolist() == [0, 3, 4, 5, 7, 1, 2, 6]
        assert plan_of(first).send_rows == ((5, 5), (1, 1))
        assert plan_of(second).send_rows == ((0, 0), (2, 2))
