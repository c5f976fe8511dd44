"""Parameters and floating-point operations of a model in closed form, tower by tower.

Only matrix multiplications count, as is usual for model FLOPs utilisation: one multiply-add is two
operations, and backward costs twice as much as forward. Recomputed activations do not count.
Letters: h hidden size, d head size, f feed-forward width, L layers, V vocabulary rows, K towers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mot_megatron.config import ModelConfig

FORWARD_AND_BACKWARD = 3
"""One matrix multiplication forward, two backward (gradients of input and weight)."""


@dataclass(frozen=True)
class ParameterCount:
    """Elements of the global parameters."""

    towers: tuple[int, ...]
    """Untied parameters of every tower, K of them."""
    shared: int
    """Embedding, head and components that are not untied."""

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self.towers) + self.shared


@dataclass(frozen=True)
class FlopCount:
    """Operations of forward and backward, over all ranks that share the tokens."""

    towers: tuple[int, ...]
    """Projections and feed-forward networks on every tower's tokens, K of them."""
    attention: int
    """The products of queries with keys and of weights with values."""
    head: int
    """The projection to the vocabulary; the embedding is a lookup and costs none."""

    @property
    def total(self) -> int:
        """All operations."""
        return sum(self.towers) + self.attention + self.head


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Parameters of the whole model, whatever the layout.

    Raises:
        ConfigError: the vocabulary is not resolved.
    """
    h, untied = model.hidden_size, model.untied
    matrices = _layer_matrices(model)
    qk_norms = 2 * model.head_dim if model.qk_norm else 0
    # (elements, untied?) of every component of all layers, then of the final norm.
    components = [
        (model.num_layers * matrices.qkv, untied.qkv),
        (model.num_layers * matrices.output_projection, untied.output_projection),
        (model.num_layers * matrices.feed_forward, untied.feed_forward),
        (model.num_layers * 2 * h, untied.norms),
        (model.num_layers * qk_norms, untied.qk_norm),
        (h, untied.final_norm),
    ]
    of_tower = sum(size for size, is_untied in components if is_untied)
    shared = sum(size for size, is_untied in components if not is_untied)
    vocabulary_matrices = 2 if model.untie_embeddings_and_output_weights else 1
    shared += vocabulary_matrices * model.num_vocabulary_rows * h
    return ParameterCount((of_tower,) * model.num_towers, shared)


def step_flops(model: ModelConfig, tower_tokens: Sequence[int], attended_pairs: int) -> FlopCount:
    """Operations of forward and backward over some tokens, for example those of a step.

    Args:
        model: Shapes.
        tower_tokens: Tokens of every tower, K of them.
        attended_pairs: Pairs of a query and a key that it sees, over all documents: n (n + 1) / 2
            for a document of n tokens, whatever a kernel computes and masks.
    """
    per_token = 2 * FORWARD_AND_BACKWARD * model.num_layers * _layer_matrices(model).total
    # Two products of 2 * heads * d operations a pair; grouped queries share keys, not products.
    per_pair = 4 * FORWARD_AND_BACKWARD * model.num_layers * model.hidden_size
    head = 2 * FORWARD_AND_BACKWARD * model.hidden_size * model.num_vocabulary_rows
    return FlopCount(
        towers=tuple(per_token * tokens for tokens in tower_tokens),
        attention=per_pair * attended_pairs,
        head=head * sum(tower_tokens),
    )


@dataclass(frozen=True)
class _LayerMatrices:
    """Elements of the matrices that one token meets in a layer."""

    qkv: int
    output_projection: int
    feed_forward: int

    @property
    def total(self) -> int:
        return self.qkv + self.output_projection + self.feed_forward


def _layer_matrices(model: ModelConfig) -> _LayerMatrices:
    h, d = model.hidden_size, model.head_dim
    return _LayerMatrices(
        qkv=h * d * (model.num_attention_heads + 2 * model.num_key_value_heads),
        output_projection=h * h,
        feed_forward=3 * h * model.feed_forward_size,
    )
