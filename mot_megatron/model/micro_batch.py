"""One micro-batch in the two orders the model uses, prepared on the host by the data path.

Letters: b sequences of s = seq_length tokens, t = b * s positions, K towers, M modalities,
g grouped slots. Grouped order is tower-major: all slots of tower 0, then tower 1, and so on; within
a tower, tokens keep their sequence order. Under sequence parallelism each tower's slots are rounded
up to a multiple of the tensor-parallel size, so g >= t; otherwise g = t.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

NO_LABEL = -100
"""The label of a position that has no next token in its document (the value torch ignores)."""


@dataclass(frozen=True)
class MicroBatch:
    """The tokens of one micro-batch on one data-parallel rank; the same on all its tensor ranks."""

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
    """[t] int64: the slot of each sequence-order position; the inverse of group_index."""
    padding_slots: torch.Tensor
    """[g - t] int64: slots that hold no token."""
    tower_slots: tuple[int, ...]
    """Slots per tower, K of them, summing to g."""
    tower_tokens: tuple[int, ...]
    """Tokens per tower without padding slots, summing to t."""
    modality_tokens: tuple[int, ...]
    """Document tokens per modality, M of them; unfilled positions are not counted."""
    modality_labels: tuple[int, ...]
    """Labels per modality, M of them: what a mean over tokens divides by."""

    def to(self, device: torch.device) -> MicroBatch:
        """The same batch with its tensors on ``device``."""
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            moved[field.name] = (
                value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            )
        return MicroBatch(**moved)
