"""One rank's part of the micro-batch of a modality group, and its exchange plan for attention.

Every rank of the group reads all sequences of the group and computes the same grouping, so each
knows what the others send without communication. Letters: P ranks of the group, K towers, T
positions of the group's sequences, of which each rank owns T / P.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from mot_megatron.model.micro_batch import NO_LABEL, ExchangePlan
from mot_megatron.parallel.placement import Placement


@dataclass(frozen=True)
class ModalityShard:
    """Which part of the group's micro-batch a rank takes, and how attention is split."""

    placement: Placement
    rank: int
    """Rank within its modality group."""
    exchange: Literal["sequence", "heads"]
    """Each rank computes attention for its own sequences, or for its heads of all sequences."""


def take_shard(
    whole: Mapping[str, Any], modalities: np.ndarray, shard: ModalityShard, slot_multiple: int
) -> dict[str, Any]:
    """Return the fields of a rank's MicroBatch.

    Args:
        whole: Fields of the group's MicroBatch as NumPy arrays, without padding slots.
        modalities: [sequences, s] modality index of each position, -1 for positions without a
            document.
        shard: The part to take.
        slot_multiple: The rank's slots per tower are rounded up to a multiple of this.
    """
    slots_of = _slots_by_rank(whole["tower_tokens"], shard.placement)
    tower_tokens = tuple(len(slots) for slots in slots_of[shard.rank])
    tower_slots = tuple(-(-tokens // slot_multiple) * slot_multiple for tokens in tower_tokens)
    source, padding = _sources(slots_of[shard.rank], tower_slots)
    labels = np.where(padding, NO_LABEL, whole["labels"][source])
    label_modalities = np.where(padding, 0, whole["label_modalities"][source])
    held = modalities.ravel()[whole["group_index"][source[~padding]]]
    num_modalities = len(whole["modality_tokens"])

    visible_from, visible_to = whole["visible_from"], whole["visible_to"]
    attended = _attended_sequences(shard, len(visible_from))
    plan = _plan(
        [[whole["group_index"][slots] for slots in row] for row in slots_of],
        [sum(_labels(whole["labels"][slots]) for slots in row) for row in slots_of],
        shard,
        (visible_to - visible_from).astype(np.int64),
    )
    return {
        "token_ids": np.where(padding, 0, whole["token_ids"][source]),
        "labels": labels,
        "label_modalities": label_modalities,
        "positions": whole["positions"].reshape(visible_from.shape)[attended].ravel(),
        "num_sequences": whole["num_sequences"],
        "visible_from": visible_from[attended],
        "visible_to": visible_to[attended],
        "group_index": np.where(padding, 0, whole["group_index"][source]),
        "ungroup_index": np.empty(0, dtype=np.int64),
        "padding_slots": np.flatnonzero(padding),
        "tower_slots": tower_slots,
        "tower_tokens": tower_tokens,
        "modality_tokens": _count(held[held >= 0], num_modalities),
        "modality_labels": _count(label_modalities[labels != NO_LABEL], num_modalities),
        "attended_pairs": plan.rank_pairs[shard.rank],
        "exchange": plan,
    }


def _attended_sequences(shard: ModalityShard, num_sequences: int) -> slice:
    """Return the sequences for which the rank computes attention: its own, or all with "heads"."""
    if shard.exchange == "heads":
        return slice(None)
    own = num_sequences // shard.placement.num_ranks
    return slice(shard.rank * own, (shard.rank + 1) * own)


def _slots_by_rank(tower_tokens: Sequence[int], placement: Placement) -> list[list[range]]:
    """Return [P][K] ranges of the group's slots; each tower's tokens are cut contiguously."""
    rows: list[list[range]] = [[] for _ in range(placement.num_ranks)]
    start = 0
    for tower, tokens in enumerate(tower_tokens):
        cuts = placement.cuts(tower, tokens)
        for row, begin, end in zip(rows, cuts[:-1], cuts[1:], strict=True):
            row.append(range(start + begin, start + end))
        start += tokens
    return rows


def _sources(ranges: Sequence[range], tower_slots: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the group's slot for each slot of the rank, and which slots are padding."""
    source = np.zeros(sum(tower_slots), dtype=np.int64)
    padding = np.ones(sum(tower_slots), dtype=bool)
    begin = 0
    for slots, size in zip(ranges, tower_slots, strict=True):
        source[begin : begin + len(slots)] = slots
        padding[begin : begin + len(slots)] = False
        begin += size
    return source, padding


def _plan(
    rows_of: Sequence[Sequence[np.ndarray]],
    labels_of: Sequence[int],
    shard: ModalityShard,
    pairs: np.ndarray,
) -> ExchangePlan:
    """Return the exchange plan of a rank.

    Args:
        rows_of: [P][K] arrays, position in the group's sequences of each row of each rank's towers.
        labels_of: [P] labels of the rows of each rank.
        shard: The rank's part.
        pairs: [sequences, s] int64, number of keys that each position attends to.
    """
    ranks = shard.placement.num_ranks
    own = rows_of[shard.rank]
    if shard.exchange == "heads":
        first = 0
        arriving = rows_of
        # Each rank computes all pairs in 1 / P of the heads.
        rank_pairs = [(pairs.sum() + rank) // ranks for rank in range(ranks)]
        send_rows = tuple((len(rows),) * ranks for rows in own)
    else:
        rank_pairs = pairs.reshape(ranks, -1).sum(1)
        size = pairs.size // ranks
        bounds = np.arange(ranks + 1) * size
        first = int(bounds[shard.rank])
        arriving = [
            [rows[slice(*np.searchsorted(rows, (first, first + size)))] for rows in row]
            for row in rows_of
        ]
        send_rows = tuple(tuple(np.diff(np.searchsorted(rows, bounds)).tolist()) for rows in own)
    arrival = np.concatenate([rows for row in arriving for rows in row]) - first
    place = np.empty_like(arrival)
    place[arrival] = np.arange(len(arrival))
    return ExchangePlan(
        send_rows=send_rows,
        receive_rows=tuple(sum(len(rows) for rows in row) for row in arriving),
        arrival_index=torch.from_numpy(arrival),
        position_index=torch.from_numpy(place),
        rank_tokens=tuple(tuple(len(rows) for rows in row) for row in rows_of),
        rank_labels=tuple(labels_of),
        rank_pairs=tuple(int(of_rank) for of_rank in rank_pairs),
    )


def _labels(labels: np.ndarray) -> int:
    return int((labels != NO_LABEL).sum())


def _count(values: np.ndarray, size: int) -> tuple[int, ...]:
    return tuple(np.bincount(values, minlength=size).tolist())
