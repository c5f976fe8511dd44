"""Next token: all discrete modalities predict the following token of their document.

Tokens enter through an embedding and leave through a projection to the vocabulary, whose weights
are split over the tensor-parallel ranks.

Letters: g slots, h hidden size, M modalities, V vocabulary rows, tp tensor-parallel size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import nn

from mot_megatron.config_model import ModelConfig
from mot_megatron.model.micro_batch import TokenRows
from mot_megatron.model.objectives.base import Objective
from mot_megatron.model.objectives.cross_entropy import VocabularyShard, Weighting, head_losses
from mot_megatron.model.sharding import ParameterSharding, set_sharding
from mot_megatron.model.towers import ParallelLinears


@dataclass(frozen=True)
class NextToken(Objective):
    """Cross entropy of the next token, with z-loss."""

    num_rows: int
    """V."""
    hidden_size: int
    z_loss_coefficient: float
    tied: bool
    """Whether the projection to the vocabulary uses the embedding's weight."""

    @classmethod
    def of(cls, model: ModelConfig) -> NextToken:
        """Return the objective of a model's tokens.

        Raises:
            ConfigError: The vocabulary size is not resolved.
        """
        return cls(
            model.num_vocabulary_rows,
            model.hidden_size,
            model.z_loss_coefficient,
            not model.untie_embeddings_and_output_weights,
        )

    def entry(self, linears: ParallelLinears) -> Embedding:
        """Build the token embedding."""
        return Embedding(self, linears)

    def exit(self, linears: ParallelLinears) -> Head:
        """Build the projection to the vocabulary with its losses."""
        return Head(self, linears)


class Embedding(nn.Module):
    """Token embedding with rows split over the tensor-parallel ranks."""

    def __init__(self, objective: NextToken, linears: ParallelLinears) -> None:
        super().__init__()
        shape = (objective.num_rows, objective.hidden_size)
        self.sequence_parallel = linears.sequence_parallel
        self.lookup = VocabParallelEmbedding(
            *shape,
            init_method=lambda _: None,
            reduce_scatter_embeddings=linears.sequence_parallel,
            config=linears.megatron_config,
            tp_group=linears.groups.tensor,
        )
        set_sharding(self.lookup.weight, ParameterSharding(shape, shard_dim=0))

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Embed ids [g] as [g, h] (sequence parallel: this rank's [g / tp, h]).

        Collectives over the tensor-parallel group: all-reduce in forward, none in backward
        (sequence parallel: reduce-scatter in forward, all-gather in backward).
        """
        if self.sequence_parallel:
            # megatron's layer expects [b, s] and transposes it before the reduce-scatter.
            return self.lookup(token_ids[None]).squeeze(1)
        return self.lookup(token_ids)


class _VocabularyLinear(ColumnParallelLinear):
    """Projection to logits, or to losses without storing logits.

    The loss is computed inside of the module that has the weight, because ZeRO-3 gathers the weight
    for this module's forward.
    """

    shard: VocabularyShard

    def forward(  # type: ignore[override]
        self,
        rows: torch.Tensor,
        weight: torch.Tensor | None,
        of_rows: TokenRows | None = None,
        weighting: Weighting | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Return logits, or with labels what ``head_losses`` returns."""
        if of_rows is None or weighting is None:
            return super().forward(rows, weight=weight)[:1]
        if self.sequence_parallel:
            rows = gather_from_sequence_parallel_region(rows, group=self.shard.group)
        else:
            rows = copy_to_tensor_model_parallel_region(rows, group=self.shard.group)
        weight = self.weight if weight is None else weight
        assert weight is not None
        return head_losses(rows, weight, of_rows, weighting, self.shard)


class Head(nn.Module):
    """Projection to the vocabulary; its weight may be tied to the embedding."""

    def __init__(self, objective: NextToken, linears: ParallelLinears) -> None:
        super().__init__()
        self.z_loss_coefficient = objective.z_loss_coefficient
        shape = (objective.num_rows, objective.hidden_size)
        self.linear = _VocabularyLinear(
            objective.hidden_size,
            objective.num_rows,
            config=linears.megatron_config,
            init_method=lambda _: None,
            bias=False,
            skip_weight_param_allocation=objective.tied,
            tp_group=linears.groups.tensor,
        )
        self.linear.shard = VocabularyShard(linears.groups.tensor, linears.groups.tensor_rank)
        if not objective.tied:
            set_sharding(self.linear.weight, ParameterSharding(shape, shard_dim=0))

    def forward(self, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        """Project [g, h] (sequence parallel: [g / tp, h]) to logits [g, V / tp]."""
        return self.linear(x, weight)[0]

    def losses(
        self,
        x: torch.Tensor,
        rows: TokenRows,
        loss_weights: torch.Tensor,
        weight: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sums of losses; see ``head_losses``.

        Args:
            x: [g, h] (sequence parallel: this rank's [g / tp, h]).
            rows: Labels of all g rows, in the same order.
            loss_weights: Of the modalities, [M] fp32.
            weight: The embedding's if it is tied, otherwise None.

        Collectives over the tensor-parallel group: also an all-reduce of the gradient of ``x`` in
        backward (sequence parallel: an all-gather in forward, a reduce-scatter in backward).
        """
        weighting = Weighting(loss_weights, self.z_loss_coefficient)
        return self.linear(x, weight, rows, weighting)
