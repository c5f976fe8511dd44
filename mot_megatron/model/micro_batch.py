"""One micro-batch in sequence order and in grouped order, prepared on the host by the data path.

Grouped order is tower-major: all slots of tower 0, then those of tower 1, and so on; within a tower
tokens keep their sequence order. Under sequence parallelism each tower's slots are rounded up to a
multiple of the tensor-parallel size, so g >= t; otherwise g = t.

Letters: b sequences of s = seq_length tokens, t = b * s positions, K towers, M modalities, g
grouped slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

NO_LABEL = -100
"""The label of a position without a next token in its document; torch ignores this value."""


@dataclass(frozen=True)
class TokenRows:
    """What the rows of a micro-batch should predict as tokens, in the order of the rows."""

    labels: torch.Tensor
    """[g] int64: global ids, or NO_LABEL."""
    label_modalities: torch.Tensor
    """[g] int64: the modality index of each label."""
    count: int
    """n: rows with a label. The host knows it, so that no kernel has to be waited for."""

    def labeled(self) -> torch.Tensor:
        """Return the indices of the rows with a label, in ascending order, [n]."""
        unlabeled = (self.labels == NO_LABEL).to(torch.uint8)
        return torch.argsort(unlabeled, stable=True)[: self.count]


@dataclass(frozen=True)
class LatentRows:
    """The rows of one modality of vectors, each of which the model sees with noise."""

    modality: int
    """Modality index."""
    slots: torch.Tensor
    """[n] int64: slot of each row."""
    inputs: torch.Tensor
    """[n, w] fp32: vectors with noise."""
    targets: torch.Tensor
    """[n, w] fp32: what the objective predicts."""
    times: torch.Tensor
    """[n] fp32: share of noise, from 0 to 1."""

    def mapped(self, function: Callable[[torch.Tensor], torch.Tensor]) -> LatentRows:
        """Return the same rows with ``function`` of their tensors."""
        return LatentRows(
            self.modality,
            *map(function, (self.slots, self.inputs, self.targets, self.times)),
        )


@dataclass(frozen=True)
class ExchangePlan:
    """Which rank attends for each row of this rank's stream, and the order of received rows.

    P is the number of ranks in the modality group, and a the number of positions for which this
    rank runs attention. Rows are received rank by rank, within a rank tower by tower, and within a
    tower in sequence order.
    """

    send_rows: tuple[tuple[int, ...], ...]
    """[K][P]: rows of tower k on this rank that go to rank p.

    If each rank attends for its own sequences, a tower's rows for rank 0 come first, then those for
    rank 1, and so on. If each rank attends in its slice of the heads, every row goes to every rank.
    """
    receive_rows: tuple[int, ...]
    """[P]: rows received from each rank, summing to a."""
    arrival_index: torch.Tensor
    """[a] int64: position, in the order of ``positions``, of each received row."""
    position_index: torch.Tensor
    """[a] int64: the inverse: received row of each position."""
    rank_tokens: tuple[tuple[int, ...], ...]
    """[P][K]: rows of each tower in each rank's stream."""
    rank_labels: tuple[int, ...]
    """[P]: labels of the rows in each rank's stream."""
    rank_pairs: tuple[int, ...]
    """[P]: ``attended_pairs`` of each rank."""

    def mapped(self, function: Callable[[torch.Tensor], torch.Tensor]) -> ExchangePlan:
        """Return the same plan with ``function`` of its tensors."""
        return replace(
            self,
            arrival_index=function(self.arrival_index),
            position_index=function(self.position_index),
        )


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch of one data-parallel rank; its tensor-parallel ranks have the same one.

    Under modality parallelism the slots belong to the towers that the rank holds and are filled
    from all sequences of the modality group (t then counts the group's positions), while positions
    and visible intervals describe the sequences that the rank attends for.
    """

    token_ids: torch.Tensor
    """[g] int64, grouped order; padding slots hold some legal id."""
    labels: torch.Tensor
    """[g] int64, grouped order: the next token of the same document, or NO_LABEL."""
    label_modalities: torch.Tensor
    """[g] int64, grouped order: modality index of the label, 0 for NO_LABEL."""
    positions: torch.Tensor
    """[t] int64, sequence order: position within the token's document, from 0."""
    visible_from: torch.Tensor
    """[b, s] int32: first position of its sequence that each position attends to.

    A position attends to one interval of its document, which contains the position itself.
    """
    visible_to: torch.Tensor
    """[b, s] int32: position after the last one that each position attends to."""
    group_index: torch.Tensor
    """[g] int64: sequence-order position of each slot's token; 0 for padding slots."""
    ungroup_index: torch.Tensor
    """[t] int64: slot of each sequence-order position, the inverse of group_index.

    Empty under modality parallelism, where a sequence's tokens are spread over several ranks.
    """
    padding_slots: torch.Tensor
    """[g - t] int64: slots that hold no token."""
    filled: torch.Tensor
    """[g] bool: slots that hold a document's token. The others are padding of sequences or slots,
    which routers must ignore."""
    num_sequences: int
    """Sequences whose tokens the slots hold: b, or those of the whole modality group."""
    tower_slots: tuple[int, ...]
    """Slots per tower, K of them, summing to g."""
    tower_tokens: tuple[int, ...]
    """Tokens per tower without padding slots, summing to t."""
    tower_filled: tuple[int, ...]
    """Filled slots per tower, K of them."""
    modality_tokens: tuple[int, ...]
    """Document tokens per modality, M of them, without unfilled positions."""
    modality_labels: tuple[int, ...]
    """Labels per modality, M of them, or vectors to predict: the divisors of means over tokens."""
    attended_pairs: int
    """Pairs of a query and a visible key for which this rank runs attention.

    A rank that attends in a slice of the heads counts that fraction of the pairs, so the ranks of a
    modality group sum to the pairs of its sequences.
    """
    exchange: ExchangePlan | None = None
    """How q, k and v are exchanged; None without modality parallelism."""
    latents: tuple[LatentRows, ...] = ()
    """Rows of each modality of vectors."""

    @property
    def num_token_labels(self) -> int:
        """Labels of the modalities of tokens."""
        return sum(self.modality_labels) - sum(len(rows.slots) for rows in self.latents)

    @property
    def slot_sequences(self) -> torch.Tensor:
        """[g] int64: sequence of each slot's token, from 0; 0 for padding slots."""
        return self.group_index // self.visible_from.shape[1]

    def to(self, device: torch.device) -> MicroBatch:
        """Return the same batch with its tensors on ``device``; from pinned memory, do not wait."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> MicroBatch:
        """Return the same batch in pinned memory of the host."""
        return self._mapped(torch.Tensor.pin_memory)

    def _mapped(self, function: Callable[[torch.Tensor], torch.Tensor]) -> MicroBatch:
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor):
                value = function(value)
            elif field.name == "latents":
                value = tuple(rows.mapped(function) for rows in value)
            elif isinstance(value, ExchangePlan):
                value = value.mapped(function)
            moved[field.name] = value
        return MicroBatch(**moved)
