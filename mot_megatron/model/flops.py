"""Parameters and floating-point operations of a model in closed form, tower by tower.

Only matrix multiplications count, as is usual for model FLOPs utilization: one multiply-add is two
operations, and backward costs twice as much as forward. Recomputed activations do not count. Nor do
causal routers: they learn beside the model, which computes the same without them.
Letters: h hidden size, d head size, f feed-forward width, L layers, V vocabulary rows, K towers, E
experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mot_megatron.config import ExpertsConfig, ModelConfig

FORWARD_AND_BACKWARD = 3
"""One matrix multiplication forward, two backward (gradients of input and weight)."""


@dataclass(frozen=True)
class ParameterCount:
    """Elements of the global parameters."""

    towers: tuple[int, ...]
    """Untied parameters of every tower, K of them: of all experts and their routers."""
    shared: int
    """Embedding, head and components that are not untied."""
    causal_routers: int = 0
    """Of all towers. They predict the experts' choices and change nothing of what is trained, so
    arms are compared without them."""

    @property
    def total(self) -> int:
        """The model's: all but causal routers."""
        return sum(self.towers) + self.shared

    @property
    def stored(self) -> int:
        """All that ranks hold and checkpoints keep."""
        return self.total + self.causal_routers


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
    qkv, output_projection = _attention_matrices(model)
    qk_norms = 2 * model.head_dim if model.qk_norm else 0
    # (elements, untied?) of every component of all layers but the feed-forward network, then of
    # the final norm.
    components = [
        (model.num_layers * qkv, untied.qkv),
        (model.num_layers * output_projection, untied.output_projection),
        (model.num_layers * 2 * h, untied.norms),
        (model.num_layers * qk_norms, untied.qk_norm),
        (h, untied.final_norm),
    ]
    of_tower = sum(size for size, is_untied in components if is_untied)
    shared = sum(size for size, is_untied in components if not is_untied)
    networks = [
        model.num_layers * _stored_network(model, experts) for experts in model.experts_of_towers
    ]
    if not untied.feed_forward:  # towers that share one network all have the same
        shared += networks[0]
        networks = [0] * model.num_towers
    vocabulary_matrices = 2 if model.untie_embeddings_and_output_weights else 1
    shared += vocabulary_matrices * model.num_vocabulary_rows * h
    causal = sum(_causal_router(model, experts) for experts in model.experts_of_towers)
    return ParameterCount(
        tuple(of_tower + network for network in networks), shared, model.num_layers * causal
    )


def step_flops(model: ModelConfig, tower_tokens: Sequence[int], attended_pairs: int) -> FlopCount:
    """Operations of forward and backward over some tokens, for example those of a step.

    A tower's experts are charged for all of its tokens, also for positions that no document fills,
    which no router sees and no expert takes: a step that is not full does a little less.

    Args:
        model: Shapes.
        tower_tokens: Tokens of every tower, K of them; a step's with unfilled positions.
        attended_pairs: Pairs of a query and a key that it sees, over all documents: n (n + 1) / 2
            for a document of n tokens, whatever a kernel computes and masks.
    """
    # Two products of 2 * heads * d operations a pair; grouped queries share keys, not products.
    per_pair = 4 * FORWARD_AND_BACKWARD * model.num_layers * model.hidden_size
    head = 2 * FORWARD_AND_BACKWARD * model.hidden_size * model.num_vocabulary_rows
    pairs = zip(active_flops_per_token(model), tower_tokens, strict=True)
    return FlopCount(
        towers=tuple(FORWARD_AND_BACKWARD * per_token * tokens for per_token, tokens in pairs),
        attention=per_pair * attended_pairs,
        head=head * sum(tower_tokens),
    )


def active_flops_per_token(model: ModelConfig) -> tuple[int, ...]:
    """Forward operations of a token in the layers' matrices, by its tower, K of them.

    Without attention's products, which depend on documents, and without the head, which all towers
    share. Of a mixture count the router and as many experts as a token runs through on average
    when none drops any: for expert choice the capacity factor.
    """
    attention = sum(_attention_matrices(model))
    return tuple(
        round(2 * model.num_layers * (attention + _active_network(model, experts)))
        for experts in model.experts_of_towers
    )


def _attention_matrices(model: ModelConfig) -> tuple[int, int]:
    """Elements of the projections before and after attention, in one layer."""
    h, d = model.hidden_size, model.head_dim
    return h * d * (model.num_attention_heads + 2 * model.num_key_value_heads), h * h


def _network(model: ModelConfig) -> int:
    """Elements of one feed-forward network, be it an expert."""
    return 3 * model.hidden_size * model.feed_forward_size


def _stored_network(model: ModelConfig, experts: ExpertsConfig | None) -> int:
    """Elements that a tower has in place of a feed-forward network, without a causal router."""
    if experts is None:
        return _network(model)
    return experts.num_moe_experts * (_network(model) + model.hidden_size)


def _active_network(model: ModelConfig, experts: ExpertsConfig | None) -> float:
    """Elements of them that a token meets, on average."""
    if experts is None:
        return _network(model)
    router = experts.num_moe_experts * model.hidden_size
    return experts.experts_per_token * _network(model) + router


def _causal_router(model: ModelConfig, experts: ExpertsConfig | None) -> int:
    if experts is None or not experts.causal_router:
        return 0
    return model.hidden_size // 2 * (model.hidden_size + experts.num_moe_experts)
