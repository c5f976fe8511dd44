"""One micro-batch in the two orders the model uses, prepared on the host by the data path.

Letters: b sequences of s = seq_length tokens, t = b * s positions, K towers, M modalities,
g grouped slots. Grouped order is tower-major: all slots of tower 0, then tower 1, and so on; within
a tower, tokens keep their sequence order. Under sequence parallelism each tower's slots are rounded
up to a multiple of the tensor-parallel size, so g >= t; otherwise g = t.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

NO_LABEL = -100
"""The label of a position that has no next token in its document (the value torch ignores)."""


@dataclass(frozen=True)
class ExchangePlan:
    """Where the rows of this rank's stream attend, and in which order the others' rows arrive.

    P ranks of a modality-parallel group, a positions for which this rank runs attention. A rank's
    rows arrive tower after tower, each tower's in sequence order, behind those of the ranks before
    it.
    """

    send_rows: tuple[tuple[int, ...], ...]
    """[K][P]: how many of the rows of tower k here attend on rank p.

    Where each rank attends for its own sequences, a tower's rows for rank 0 come first, then those
    for rank 1; where it attends in its slice of the heads, every row goes to every rank.
    """
    receive_rows: tuple[int, ...]
    """[P]: rows that arrive from each rank, summing to a."""
    arrival_index: torch.Tensor
    """[a] int64: position, in the order of ``positions``, of each row as it arrives."""
    position_index: torch.Tensor
    """[a] int64: the inverse, the arrived row of each position."""
    rank_tokens: tuple[tuple[int, ...], ...]
    """[P][K]: rows of every tower in every rank's stream."""
    rank_pairs: tuple[int, ...]
    """[P]: ``attended_pairs`` of every rank."""

    def to(self, device: torch.device) -> ExchangePlan:
        """The same plan with its tensors on ``device``."""
        return replace(
            self,
            arrival_index=self.arrival_index.to(device, non_blocking=True),
            position_index=self.position_index.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch as one data-parallel rank needs it; the same on all its tensor ranks.

    Under modality parallelism the slots are those of the towers that the rank holds, filled from
    all the group's sequences (t are the positions of the group then), while positions and
    document_ids are those of the sequences that the rank attends for.
    """

    token_ids: torch.Tensor
    """[g] int64, grouped order; padding slots hold a legal id."""
    labels: torch.Tensor
    """[g] int64, grouped order: the next token of the same document, or NO_LABEL."""
    label_modalities: torch.Tensor
    """[g] int64, grouped order: modality index of the label, 0 where there is none."""
    positions: torch.Tensor
    """[t] int64, sequence order: position within the token's document, from 0."""
    document_ids: torch.Tensor
    """[b, s] int32: equal inside a document, ascending along a sequence."""
    group_index: torch.Tensor
    """[g] int64: the sequence-order position that fills each slot; padding slots hold 0."""
    ungroup_index: torch.Tensor
    """[t] int64: the slot of each sequence-order position; the inverse of group_index.

    Empty under modality parallelism, where a sequence's tokens lie on several ranks.
    """
    padding_slots: torch.Tensor
    """[g - t] int64: slots that hold no token."""
    filled: torch.Tensor
    """[g] bool: slots that hold a token of a document; the others hold padding of sequences or of
    slots, which no router may see."""
    tower_slots: tuple[int, ...]
    """Slots per tower, K of them, summing to g."""
    tower_tokens: tuple[int, ...]
    """Tokens per tower without padding slots, summing to t."""
    tower_filled: tuple[int, ...]
    """Filled slots per tower, K of them."""
    modality_tokens: tuple[int, ...]
    """Document tokens per modality, M of them; unfilled positions are not counted."""
    modality_labels: tuple[int, ...]
    """Labels per modality, M of them: what a mean over tokens divides by."""
    attended_pairs: int
    """Pairs of a query and a key that it sees, for which the rank runs attention.

    Where it attends in a part of the heads, that part of the pairs: over the ranks of a
    modality group they add up to those of its sequences.
    """
    exchange: ExchangePlan | None = None
    """How q, k and v travel; None without modality parallelism."""

    def to(self, device: torch.device) -> MicroBatch:
        """The same batch with its tensors on ``device``."""
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor):
                value = value.to(device, non_blocking=True)
            elif isinstance(value, ExchangePlan):
                value = value.to(device)
            moved[field.name] = value
        return MicroBatch(**moved)
