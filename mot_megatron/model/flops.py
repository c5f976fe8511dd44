"""Parameter counts and floating-point operations of a model in closed form, by tower.

Only matrix multiplications count, as is usual for model FLOPs utilization (MFU): one multiply-add
is two operations, and backward costs twice as much as forward, or as much as forward for a frozen
matrix. Recomputed activations do not count. Causal routers do not count either, because the model
computes the same without them; nor do the projections of vectors and their times, which are a
fraction of one layer's.

Letters: h hidden size, V vocabulary rows, K towers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mot_megatron.config_model import ExpertsConfig, ModelConfig
from mot_megatron.model.inventory import HeldParameter, layer_parameters, outer_parameters
from mot_megatron.model.sharding import SHARED

FORWARD_AND_BACKWARD = 3
"""One matrix multiplication in forward, two in backward (gradients of input and weight). A frozen
matrix has no gradient, and saves one of the three."""


@dataclass(frozen=True)
class ParameterCount:
    """Elements of the global parameters."""

    towers: tuple[int, ...]
    """Untied parameters of each of the K towers, with all experts and their routers."""
    shared: int
    """Embedding, head and components that are not untied."""
    frozen: int = 0
    """The part of ``total`` that is not trained."""
    causal_routers: int = 0
    """Causal routers of all towers. They predict the experts' choices without influencing the
    model, so comparisons of models leave them out."""

    @property
    def total(self) -> int:
        """Parameters of the model, without causal routers."""
        return sum(self.towers) + self.shared

    @property
    def stored(self) -> int:
        """Parameters that ranks hold and checkpoints store, with causal routers."""
        return self.total + self.causal_routers


@dataclass(frozen=True)
class FlopCount:
    """Operations of forward and backward, summed over all ranks that process the tokens."""

    towers: tuple[int, ...]
    """Projections and feed-forward networks of each of the K towers, on its tokens."""
    attention: int
    """Products of queries with keys and of attention weights with values."""
    head: int
    """The projection of rows with a label to the vocabulary; the embedding is a lookup and costs
    none."""

    @property
    def total(self) -> int:
        """All operations."""
        return sum(self.towers) + self.attention + self.head


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Count the parameters of the whole model; no layout changes the number.

    Raises:
        ConfigError: the vocabulary size is not resolved.
    """
    towers, shared, frozen, causal = [0] * model.num_towers, 0, 0, 0
    for copies, parameters in (
        (model.num_layers, layer_parameters(model)),
        (1, outer_parameters(model)),
    ):
        for parameter in parameters:
            if parameter.auxiliary:
                causal += copies * parameter.size
            elif parameter.tower == SHARED:
                shared += copies * parameter.size
            else:
                towers[parameter.tower] += copies * parameter.size
                frozen += copies * parameter.size * parameter.frozen
    return ParameterCount(tuple(towers), shared, frozen, causal)


def step_flops(
    model: ModelConfig, tower_tokens: Sequence[int], attended_pairs: int, labels: int
) -> FlopCount:
    """Count the operations of forward and backward over some tokens, such as those of a step.

    Experts are charged for all tokens of their tower, including positions that no document fills.
    Routers ignore those, so a step that is not full does slightly less work.

    Args:
        model: The model's shapes.
        tower_tokens: Tokens of each of the K towers, including unfilled positions.
        attended_pairs: Pairs of a query and a visible key, over all documents: n (n + 1) / 2 for a
            causal document of n tokens, whatever a kernel computes and masks.
        labels: Labels, of all towers: only rows with a label are projected to the vocabulary.
    """
    # Two products of 2 * heads * d operations per pair; grouped queries share keys, not products.
    per_pair = 4 * FORWARD_AND_BACKWARD * model.num_layers * model.hidden_size
    head = 2 * FORWARD_AND_BACKWARD * model.hidden_size * model.num_vocabulary_rows
    per_token = zip(active_flops_per_token(model), _frozen_flops_per_token(model), strict=True)
    return FlopCount(
        towers=tuple(
            (FORWARD_AND_BACKWARD * active - frozen) * tokens
            for (active, frozen), tokens in zip(per_token, tower_tokens, strict=True)
        ),
        attention=per_pair * attended_pairs,
        head=head * labels,
    )


def active_flops_per_token(model: ModelConfig) -> tuple[int, ...]:
    """Count the forward operations of a token in the layers' matrices, by tower, K of them.

    Attention's products, which depend on documents, and the head, which all towers share, are left
    out. A mixture counts its router and the mean number of experts that process a token when none
    is dropped: ``topk``, or the capacity factor of expert choice.
    """
    return _flops_per_token(model, _matrices(model))


def _frozen_flops_per_token(model: ModelConfig) -> tuple[int, ...]:
    """Count the part of ``active_flops_per_token`` in frozen matrices, which get no gradients."""
    return _flops_per_token(model, [matrix for matrix in _matrices(model) if matrix.frozen])


def _matrices(model: ModelConfig) -> list[HeldParameter]:
    return [p for p in layer_parameters(model) if len(p.shape) == 2 and not p.auxiliary]


def _flops_per_token(model: ModelConfig, matrices: Sequence[HeldParameter]) -> tuple[int, ...]:
    return tuple(
        round(2 * model.num_layers * _active_elements(matrices, tower, experts))
        for tower, experts in enumerate(model.experts_of_towers)
    )


def _active_elements(
    matrices: Sequence[HeldParameter], tower: int, experts: ExpertsConfig | None
) -> float:
    """Count the matrix elements of one layer that a token of ``tower`` meets, on average."""
    used = [matrix for matrix in matrices if matrix.tower in (tower, SHARED)]
    plain = sum(matrix.size for matrix in used if not matrix.experts)
    if experts is None:
        return plain
    one_expert = sum(matrix.size // matrix.experts for matrix in used if matrix.experts)
    return plain + experts.experts_per_token * one_expert
