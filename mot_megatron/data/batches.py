"""Build a MicroBatch from packed sequences: labels, positions, and tokens sorted by tower.

Tokens are sorted once per batch on the host, so in the model each tower's tokens are a contiguous
slice of known size. Letters as in model/micro_batch.py: b sequences of s positions, t = b * s, g
slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mot_megatron.data import _native
from mot_megatron.data.modality_shards import ModalityShard, take_shard
from mot_megatron.errors import DataError
from mot_megatron.model.micro_batch import NO_LABEL, MicroBatch


def build_micro_batch(  # noqa: PLR0913 - what positions hold, and how they are grouped
    token_ids: np.ndarray,
    document_ids: np.ndarray,
    modality_of_id: np.ndarray,
    towers_of_modalities: Sequence[int],
    *,
    num_towers: int,
    slot_multiple: int = 1,
    filled_tokens: np.ndarray | None = None,
    visible: tuple[np.ndarray, np.ndarray] | None = None,
    context: np.ndarray | None = None,
    shard: ModalityShard | None = None,
) -> MicroBatch:
    """Group the tokens of one micro-batch by tower. This is a pure function on the CPU.

    Args:
        token_ids: [b, s] integers, sequence order.
        document_ids: [b, s] integers, equal within a document and ascending along a sequence.
        modality_of_id: [vocab_size] int8, modality index of each id.
        towers_of_modalities: Tower index of each modality, M of them.
        num_towers: K; a tower may have no modality.
        slot_multiple: The slots of each tower are rounded up to a multiple of this: the
            tensor-parallel size with sequence parallelism, otherwise 1.
        filled_tokens: [b] number of leading positions of each sequence that documents occupy; later
            positions get no label and count for no modality. Default: all.
        visible: [b, s] integers each, the interval of positions of its sequence that each position
            attends to: the first one, and the one after the last. It contains the position and lies
            within the document. Default: the document up to the position.
        context: [b, s] bool, tokens that are context only: they are no labels, but are attended to
            and followed by labels as others are. Default: none.
        shard: With modality parallelism, the part of the micro-batch to return. The sequences are
            then those of the whole group, rank by rank, and b is a multiple of its size.

    Raises:
        DataError: An id is outside the vocabulary. An embedding would not report it: with tensor
            parallelism, it silently becomes zeros.
    """
    sequences, seq_length = token_ids.shape
    vocab_size = len(modality_of_id)
    if token_ids.min() < 0 or token_ids.max() >= vocab_size:
        sequence, position = np.argwhere((token_ids < 0) | (token_ids >= vocab_size))[0]
        raise DataError(
            f"sequence {sequence}, position {position}: token id "
            f"{token_ids[sequence, position]}, expected 0..{vocab_size - 1}"
        )
    everything = np.full(sequences, seq_length, dtype=np.int64)
    filled = everything if filled_tokens is None else filled_tokens
    grouped = _native.group(
        token_ids,
        document_ids,
        filled,
        modality_of_id,
        np.asarray(towers_of_modalities, dtype=np.int64),
        num_towers,
        slot_multiple if shard is None else 1,
    )
    first, end = visible or _causal(grouped["positions"].reshape(token_ids.shape))
    if context is not None:
        grouped = {**grouped, **_without_labels(grouped, context)}
    fields = {
        "visible_from": first.astype(np.int32),
        "visible_to": end.astype(np.int32),
        "num_sequences": sequences,
        "attended_pairs": int((end - first).sum()),
        **grouped,
    }
    used = np.arange(seq_length) < filled[:, None]
    if shard is not None:
        modalities = np.where(used, modality_of_id[token_ids], -1)
        fields = take_shard(fields, modalities, shard, slot_multiple)
    fields.update(_filled_slots(fields, used.ravel()))
    return MicroBatch(**{name: _tensor(value) for name, value in fields.items()})


def _causal(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the visible intervals of causal documents, given positions within them, [b, s]."""
    places = np.arange(positions.shape[1])
    return places - positions, np.broadcast_to(places + 1, positions.shape)


def _without_labels(grouped: Mapping[str, Any], context: np.ndarray) -> dict[str, Any]:
    """Return the labels without those that are context only.

    A label is the token after the slot's, in the same sequence.
    """
    is_dropped = np.append(context.ravel()[1:], False)[grouped["group_index"]]
    labels = np.where(is_dropped, NO_LABEL, grouped["labels"])
    modalities = np.where(is_dropped, 0, grouped["label_modalities"])
    counts = np.bincount(modalities[labels != NO_LABEL], minlength=len(grouped["modality_labels"]))
    return {
        "labels": labels,
        "label_modalities": modalities,
        "modality_labels": tuple(counts.tolist()),
    }


def _filled_slots(fields: dict[str, Any], used: np.ndarray) -> dict[str, Any]:
    """Return which slots hold document tokens, and their number per tower.

    ``used`` says the same for each position.
    """
    in_slots = used[fields["group_index"]]
    in_slots[fields["padding_slots"]] = False
    ends = np.cumsum(fields["tower_slots"])
    counts = [int(part.sum()) for part in np.split(in_slots, ends[:-1])]
    return {"filled": in_slots, "tower_filled": tuple(counts)}


def _tensor(value: Any) -> Any:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value
