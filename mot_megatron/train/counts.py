"""Counts of the global batch of a step, summed over all ranks before the first forward pass.

The loss is a mean over the tokens of the global batch, so its divisor must be known first. Whatever
else all ranks must agree on once per step is part of the same small all-reduce.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from mot_megatron.config_model import ModelConfig
from mot_megatron.model.flops import step_flops
from mot_megatron.model.micro_batch import MicroBatch
from mot_megatron.parallel.groups import ProcessGroups

_RATIO_UNITS = 10**6
"""Ratios are all-reduced as integer millionths, in the same int64 tensor as the counts."""


@dataclass(frozen=True)
class GlobalCounts:
    """Counts over all micro-batches of all data-parallel ranks; M modalities, K towers."""

    modality_labels: tuple[int, ...]
    """Labels per modality, M of them."""
    modality_tokens: tuple[int, ...]
    """Document tokens per modality, M of them."""
    tower_tokens: tuple[int, ...]
    """Tokens per tower including padding, K of them."""
    attended_pairs: int
    """(query, key) pairs that attention computes."""
    imbalance: float
    """FLOPs of the busiest rank of a modality group over the group's mean, 1 or more.

    This is a mean over micro-batches and groups, and 1 without modality parallelism. The ranks of a
    group exchange tokens before and after attention in every layer, so they wait for the busiest
    rank of each of the two parts.
    """
    stop: bool
    """Whether any rank was asked to stop."""

    def flops(self, model: ModelConfig) -> float:
        """Return the FLOPs of the model in the step, over all ranks."""
        labels = sum(self.modality_labels[modality] for modality in model.token_modalities)
        return step_flops(model, self.tower_tokens, self.attended_pairs, labels).total

    @classmethod
    def gather(
        cls,
        batches: Sequence[MicroBatch],
        model: ModelConfig,
        groups: ProcessGroups,
        stop: bool = False,
    ) -> GlobalCounts:
        """Sum over this rank's ``batches``, which are on the host, and over data-parallel ranks.

        Collectives: one all-reduce over the world, since a stop request may have reached any rank.
        """
        columns = [
            (
                *batch.modality_labels,
                *batch.modality_tokens,
                *batch.tower_tokens,
                batch.attended_pairs,
                round(_imbalance(batch, model) * _RATIO_UNITS),
            )
            for batch in batches
        ]
        local = [sum(column) for column in zip(*columns, strict=True)]
        total = torch.tensor([*local, int(stop)], dtype=torch.int64, device=groups.device)
        dist.all_reduce(total)
        *values, stops = total.tolist()
        # Tensor-parallel ranks and pipeline stages hold the same batches.
        copies = groups.tensor_size * groups.pipeline_size
        values = [value // copies for value in values]
        modalities, towers = len(batches[0].modality_labels), len(batches[0].tower_tokens)
        labels, tokens = values[:modalities], values[modalities : 2 * modalities]
        tower_tokens = values[2 * modalities : 2 * modalities + towers]
        pairs, imbalances = values[-2:]
        return cls(
            modality_labels=tuple(labels),
            modality_tokens=tuple(tokens),
            tower_tokens=tuple(tower_tokens),
            attended_pairs=pairs,
            imbalance=imbalances / _RATIO_UNITS / (len(batches) * groups.data_size),
            stop=stops > 0,
        )

    def loss_weight(self, loss_weights: Sequence[float]) -> float:
        """Return the sum of the loss weights of all labels, by which token losses are divided.

        Return 1 if no label has a weight, since the sum of losses is then 0.
        """
        pairs = zip(self.modality_labels, loss_weights, strict=True)
        return sum(labels * weight for labels, weight in pairs) or 1.0


def _imbalance(batch: MicroBatch, model: ModelConfig) -> float:
    """Return the FLOPs of the busiest rank of this rank's modality group over the mean.

    Ranks wait for each other before and after attention, so the maximum in attention and the
    maximum of the rest add up, even if they are on different ranks.
    """
    if batch.exchange is None:
        return 1.0
    plan, no_tokens = batch.exchange, [0] * model.num_towers
    of_tokens = [
        step_flops(model, tokens, 0, labels).total
        for tokens, labels in zip(plan.rank_tokens, plan.rank_labels, strict=True)
    ]
    of_pairs = [step_flops(model, no_tokens, pairs, 0).total for pairs in plan.rank_pairs]
    busiest, total = max(of_tokens) + max(of_pairs), sum(of_tokens) + sum(of_pairs)
    return busiest * len(of_tokens) / total
