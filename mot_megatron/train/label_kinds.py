"""Held-out loss of a trained model by kind of label.

Some labels are far easier than others: special tokens, whose positions are nearly fixed, and the
most common code of a modality, which in images is the background. They distort a mean over all
labels of a modality. Letters: M modalities, V token ids.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from mot_megatron.data.corpus import HELD_OUT_SPLIT, TRAIN_SPLIT, Corpus
from mot_megatron.data.intervals import mask_of
from mot_megatron.data.loader import DataShard, evaluation_batches
from mot_megatron.model.micro_batch import NO_LABEL, MicroBatch
from mot_megatron.model.model import MixtureOfTransformers
from mot_megatron.train.session import grouping_plan
from mot_megatron.train.trained import TrainedModel

Kind = Literal["special tokens", "most common", "others"]
KINDS: tuple[Kind, ...] = ("special tokens", "most common", "others")


@dataclass(frozen=True)
class KindLoss:
    """Held-out loss of one kind of a modality's labels."""

    modality: str
    kind: Kind
    labels: int
    bits: float
    """Bits per token; NaN without labels."""


def held_out_by_kind(trained: TrainedModel, limit_sequences: int | None = None) -> list[KindLoss]:
    """Evaluate on the validation split and return three losses per modality of tokens.

    This involves this process only. Tokens are routed as the model currently routes them; see
    ``MixtureOfTransformers.routed_causally``.

    Args:
        trained: A model that this process holds whole.
        limit_sequences: Number of packed sequences to use; None for all.
    """
    config, corpus = trained.config, trained.corpus
    batches = evaluation_batches(
        corpus,
        HELD_OUT_SPLIT,
        seq_length=config.data.seq_length,
        micro_batch_size=config.training.micro_batch_size,
        grouping=grouping_plan(config),
        shard=DataShard(0, 1),
        limit_sequences=limit_sequences,
    )
    sums, counts = _sums(trained.model, batches, torch.from_numpy(kind_of_id(corpus)))
    losses = []
    for place, modality in enumerate(corpus.description.modalities):
        if modality.width is not None:
            continue  # vectors are no labels of a kind
        for at, kind in enumerate(KINDS, start=place * len(KINDS)):
            labels = int(counts[at])
            bits = float(sums[at]) / labels / math.log(2) if labels else math.nan
            losses.append(KindLoss(modality.name, kind, labels, bits))
    return losses


def kind_of_id(corpus: Corpus) -> np.ndarray:
    """Return, for each id, modality index * 3 + index in KINDS: [V] int64.

    The most common id of a modality is counted in the training split, without special tokens and
    tokens that are context only. For
    text it is a word or a comma, which is not easy to predict, but one rule for all modalities is
    clearer.
    """
    description = corpus.description
    special = np.zeros(description.vocab_size, dtype=bool)
    special[list(description.special_tokens.values())] = True
    counts = np.zeros(description.vocab_size, dtype=np.int64)
    for part in corpus.parts(TRAIN_SPLIT):
        tokens = part.tokens
        if part.has_context:
            tokens = tokens[~mask_of(part.context, 0, len(tokens))]
        counts += np.bincount(tokens, minlength=description.vocab_size)
    counts[special] = -1
    kinds = description.modality_of_id.astype(np.int64) * len(KINDS)
    most_common = [
        modality.first_id + int(counts[modality.first_id :][: modality.size].argmax())
        for modality in description.modalities
    ]
    kinds += KINDS.index("others")
    kinds[special] += KINDS.index("special tokens") - KINDS.index("others")
    kinds[most_common] += KINDS.index("most common") - KINDS.index("others")
    return kinds


@torch.no_grad()
def _sums(
    model: MixtureOfTransformers, batches: Iterable[MicroBatch], kinds: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sums of cross entropy in nats and numbers of labels, by kind of label."""
    size = len(model.config.modalities) * len(KINDS)
    sums, counts = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.int64)
    for batch in tqdm(batches, "held out", delay=5, ncols=100, leave=False, disable=None):
        here = batch.to(model.groups.device)
        logits = model.sequence_logits(here).float()
        labels = here.labels[here.ungroup_index]
        losses = F.cross_entropy(logits, labels, ignore_index=NO_LABEL, reduction="none").cpu()
        labeled = labels.cpu() != NO_LABEL
        found = kinds[labels.cpu()[labeled]]
        sums.index_add_(0, found, losses[labeled].double())
        counts.index_add_(0, found, torch.ones_like(found))
    return sums, counts
