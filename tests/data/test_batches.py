"""Grouping compared with a NumPy reference, and the properties the model relies on."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mot_megatron.data import _native
from mot_megatron.data.batches import build_micro_batch
from mot_megatron.data.modality_shards import ModalityShard
from mot_megatron.errors import DataError
from mot_megatron.model.micro_batch import NO_LABEL, MicroBatch
from mot_megatron.parallel.placement import Placement

IDS_PER_MODALITY = 5


@dataclass(frozen=True)
class Case:
    """The arguments of one call of build_micro_batch."""

    token_ids: np.ndarray
    document_ids: np.ndarray
    filled: np.ndarray
    context: np.ndarray | None
    modality_of_id: np.ndarray
    towers_of_modalities: tuple[int, ...]
    num_towers: int
    slot_multiple: int

    def build(self) -> MicroBatch:
        return build_micro_batch(
            self.token_ids,
            self.document_ids,
            self.modality_of_id,
            self.towers_of_modalities,
            num_towers=self.num_towers,
            slot_multiple=self.slot_multiple,
            filled_tokens=self.filled,
            context=self.context,
        )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Random mixes: modalities may be absent from the batch, and towers from the map."""
    modalities = draw(st.integers(1, 4))
    num_towers = draw(st.integers(1, 4))
    towers = tuple(draw(st.integers(0, num_towers - 1)) for _ in range(modalities))
    present = draw(st.lists(st.integers(0, modalities - 1), min_size=1, unique=True))
    sequences, length = draw(st.integers(1, 3)), draw(st.integers(1, 20))
    generator = np.random.default_rng(draw(st.integers(0, 2**31)))
    modality = generator.choice(np.array(present), (sequences, length))
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
        generator.random(modality.shape) < 0.4 if draw(st.booleans()) else None,
        np.repeat(np.arange(modalities, dtype=np.int8), IDS_PER_MODALITY),
        towers,
        num_towers,
        draw(st.sampled_from([1, 2, 4])),
    )


def reference_group(case: Case) -> dict[str, np.ndarray | tuple[int, ...] | int]:
    """Compute the fields of MicroBatch by sorting and masking."""
    sequences, length = case.token_ids.shape
    total = sequences * length
    used = np.arange(length) < case.filled[:, None]
    labels = np.full((sequences, length), NO_LABEL)
    same = case.document_ids[:, 1:] == case.document_ids[:, :-1]
    wanted = same & used[:, 1:]
    if case.context is not None:
        wanted &= ~case.context[:, 1:]
    labels[:, :-1] = np.where(wanted, case.token_ids[:, 1:], NO_LABEL)
    labels = labels.ravel()
    positions = np.zeros((sequences, length), dtype=np.int64)
    for column in range(1, length):
        positions[:, column] = np.where(same[:, column - 1], positions[:, column - 1] + 1, 0)
    ids = case.token_ids.ravel()
    modality = case.modality_of_id[ids].astype(np.int64)
    label_modality = np.where(labels == NO_LABEL, 0, case.modality_of_id[np.maximum(labels, 0)])
    tower = np.array(case.towers_of_modalities)[modality]
    tower_tokens = np.bincount(tower, minlength=case.num_towers)
    tower_slots = -(-tower_tokens // case.slot_multiple) * case.slot_multiple
    begins = np.cumsum(tower_slots) - tower_slots
    by_tower = np.argsort(tower, kind="stable")
    rank_in_tower = np.empty(total, dtype=np.int64)
    rank_in_tower[by_tower] = np.arange(total) - np.repeat(
        np.cumsum(tower_tokens) - tower_tokens, tower_tokens
    )
    slot = begins[tower] + rank_in_tower
    slots = int(tower_slots.sum())

    def grouped(values: np.ndarray, padding: int) -> np.ndarray:
        result = np.full(slots, padding, dtype=np.int64)
        result[slot] = values
        return result

    filled = grouped(used.ravel(), False).astype(bool)
    modalities = len(case.towers_of_modalities)
    counted = label_modality[labels != NO_LABEL]
    return {
        "token_ids": grouped(ids, 0),
        "labels": grouped(labels, NO_LABEL),
        "label_modalities": grouped(label_modality, 0),
        "positions": positions.ravel(),
        "visible_from": np.arange(length) - positions,
        "visible_to": np.tile(np.arange(length) + 1, (sequences, 1)),
        "attended_pairs": int((positions + 1).sum()),
        "group_index": grouped(np.arange(total), 0),
        "ungroup_index": slot,
        "padding_slots": np.setdiff1d(np.arange(slots), slot),
        "filled": filled,
        "tower_filled": tuple(np.bincount(tower[used.ravel()], minlength=case.num_towers).tolist()),
        "tower_slots": tuple(tower_slots.tolist()),
        "tower_tokens": tuple(tower_tokens.tolist()),
        "modality_tokens": tuple(
            np.bincount(modality[used.ravel()], minlength=modalities).tolist()
        ),
        "modality_labels": tuple(np.bincount(counted, minlength=modalities).tolist()),
    }


@given(cases())
def test_equals_the_reference(case: Case) -> None:
    batch = case.build()
    for name, expected in reference_group(case).items():
        found = getattr(batch, name)
        if isinstance(expected, np.ndarray):
            kinds = {"visible": torch.int32, "filled": torch.bool}
            assert found.dtype == kinds.get(name.split("_")[0], torch.int64), name
            assert np.array_equal(found.numpy(), expected), name
        else:
            assert found == expected, name


@given(cases())
def test_ungroup_is_the_inverse_of_group(case: Case) -> None:
    batch = case.build()
    stream = torch.randn(case.token_ids.size, 2, generator=torch.Generator().manual_seed(0))
    grouped = stream[batch.group_index]
    assert torch.equal(grouped[batch.ungroup_index], stream)
    assert torch.equal(
        batch.token_ids[batch.ungroup_index], torch.from_numpy(case.token_ids.ravel())
    )


@given(cases())
def test_each_tower_is_one_slice_of_its_own_tokens(case: Case) -> None:
    batch = case.build()
    begin = 0
    for tower, (slots, tokens) in enumerate(
        zip(batch.tower_slots, batch.tower_tokens, strict=True)
    ):
        assert slots % case.slot_multiple == 0
        assert 0 <= slots - tokens < case.slot_multiple
        ids = batch.token_ids[begin : begin + tokens].numpy()
        towers = np.array(case.towers_of_modalities)[case.modality_of_id[ids]]
        assert (towers == tower).all()
        assert (np.diff(batch.group_index[begin : begin + tokens].numpy()) > 0).all()
        begin += slots
    assert begin == len(batch.token_ids)


@given(cases(), st.integers(1, 3), st.sampled_from(["sequence", "heads"]))
def test_shards_mark_the_same_filled_tokens_as_the_whole_batch(
    case: Case, ranks: int, exchange: Literal["sequence", "heads"]
) -> None:
    """The ranks of a modality group mark the tokens of documents as filled, but not padding."""
    length = case.token_ids.shape[1]
    batch = {
        "token_ids": np.tile(case.token_ids, (ranks, 1)),
        "document_ids": np.tile(case.document_ids, (ranks, 1)),
        "filled_tokens": np.tile(case.filled, ranks),
        "modality_of_id": case.modality_of_id,
        "towers_of_modalities": case.towers_of_modalities,
        "num_towers": case.num_towers,
    }
    used = (np.arange(length) < batch["filled_tokens"][:, None]).ravel()
    # The first tower is everywhere, the others on one rank each.
    rows = [[1.0 / ranks] + [0.0] * (case.num_towers - 1) for _ in range(ranks)]
    for tower in range(1, case.num_towers):
        rows[tower % ranks][tower] = 1.0
    placement = Placement(tuple(map(tuple, rows)))
    seen, counts = [], np.zeros(case.num_towers, dtype=int)
    for rank in range(ranks):
        shard = ModalityShard(placement, rank, exchange)
        part = build_micro_batch(**batch, slot_multiple=case.slot_multiple, shard=shard)
        padding = np.isin(np.arange(len(part.filled)), part.padding_slots.numpy())
        source = part.group_index.numpy()
        assert np.array_equal(part.filled.numpy(), used[source] & ~padding)
        seen += source[part.filled.numpy()].tolist()
        ends = np.cumsum(part.tower_slots)[:-1]
        of_towers = tuple(int(s.sum()) for s in np.split(part.filled.numpy(), ends))
        assert part.tower_filled == of_towers
        counts += of_towers
    assert sorted(seen) == np.flatnonzero(used).tolist()
    assert tuple(counts) == build_micro_batch(**batch).tower_filled


def test_hand_computed_batch() -> None:
    # Modalities: ids 0..4 and 5..9, towers 1 and 0. Two documents of three and two tokens, then one
    # unfilled position.
    batch = build_micro_batch(
        np.array([[0, 5, 6, 1, 7, 2]]),
        np.array([[0, 0, 0, 1, 1, 2]]),
        np.repeat(np.arange(2, dtype=np.int8), 5),
        (1, 0),
        num_towers=2,
        slot_multiple=2,
        filled_tokens=np.array([5]),
    )
    # Tower 0: positions 1, 2, 4 and one padding slot; tower 1: positions 0, 3, 5 and one.
    assert batch.tower_slots == (4, 4)
    assert batch.tower_tokens == (3, 3)
    assert batch.group_index.tolist() == [1, 2, 4, 0, 0, 3, 5, 0]
    assert batch.padding_slots.tolist() == [3, 7]
    assert batch.ungroup_index.tolist() == [4, 0, 1, 5, 2, 6]
    assert batch.token_ids.tolist() == [5, 6, 7, 0, 0, 1, 2, 0]
    none = NO_LABEL
    assert batch.labels.tolist() == [6, none, none, none, 5, 7, none, none]
    assert batch.label_modalities.tolist() == [1, 0, 0, 0, 1, 1, 0, 0]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 0]
    assert batch.filled.tolist() == [True] * 3 + [False] + [True] * 2 + [False] * 2
    assert batch.tower_filled == (3, 2)
    assert batch.modality_tokens == (2, 3)  # the unfilled position is not counted
    assert batch.modality_labels == (0, 3)


def test_all_positions_count_as_filled_by_default() -> None:
    table = np.zeros(3, dtype=np.int8)
    batch = build_micro_batch(
        np.array([[0, 1], [2, 0]]), np.zeros((2, 2), int), table, (0,), num_towers=1
    )
    assert batch.modality_tokens == (4,)
    assert batch.modality_labels == (2,)  # no label crosses from one sequence to the next


@pytest.mark.parametrize("bad", [-1, 3])
def test_error_names_an_id_outside_the_vocabulary(bad: int) -> None:
    ids = np.array([[0, 1], [2, bad]])
    with pytest.raises(DataError, match=f"sequence 1, position 1: token id {bad}, .* 0..2"):
        build_micro_batch(ids, np.zeros_like(ids), np.zeros(3, np.int8), (0,), num_towers=1)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"token_ids": np.array([[9, 0]])}, IndexError),
        ({"tower_of_modality": np.array([1])}, IndexError),
        ({"modality_of_id": np.array([1, 0], np.int8)}, IndexError),
        ({"document_ids": np.zeros((2, 1), np.int32)}, ValueError),
        ({"filled": np.array([1, 1])}, ValueError),
        ({"filled": np.array([3])}, IndexError),
        ({"slot_multiple": 0}, ValueError),
    ],
)
def test_native_code_rejects_invalid_arguments(changes: dict, error: type[Exception]) -> None:
    arguments = {
        "token_ids": np.array([[0, 1]]),
        "document_ids": np.zeros((1, 2), np.int32),
        "filled": np.array([2]),
        "modality_of_id": np.zeros(2, np.int8),
        "tower_of_modality": np.array([0]),
        "towers": 1,
        "slot_multiple": 1,
    }
    _native.group(**arguments)
    with pytest.raises(error):
        _native.group(**(arguments | changes))
