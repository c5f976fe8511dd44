"""List the parameters that a rank holds, from the configuration alone; no module is built.

This is the one list of weight shapes outside the modules themselves: memory plans, parameter counts
and FLOPs are computed from it, for layouts of any size on one machine. A test holds it equal to
``named_parameters()`` of the built model, in its order.

Letters: h hidden size, d head size, f feed-forward width, V vocabulary rows, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mot_megatron.config import Config
from mot_megatron.config_model import ExpertsConfig, ModelConfig
from mot_megatron.model.pieces import pieces_of_stage
from mot_megatron.model.sharding import SHARED, ParameterSharding

FREQUENCIES = 64
"""Sines, and cosines, of which the time of a vector's noise consists."""


@dataclass(frozen=True)
class HeldParameter:
    """One rank's shard of one parameter."""

    name: str
    """Global name: the same on all ranks that hold a shard."""
    shape: tuple[int, ...]
    """Shape of this rank's shard."""
    tower: int
    """Index of the tower that owns the parameter, or SHARED."""
    sharding: ParameterSharding
    """Global shape and the dimension that tensor parallelism splits; of one expert if stacked."""
    replica: bool = False
    """Whether it copies another pipeline stage's parameter: a tied embedding on the last stage."""
    experts: int = 0
    """Number of experts stacked in it; 0 for any other parameter."""
    auxiliary: bool = False
    """Whether it is trained beside the model without influencing it: a causal router."""
    frozen: bool = False
    """Whether it is not trained, because its tower is frozen."""

    @property
    def size(self) -> int:
        """Elements on this rank."""
        return math.prod(self.shape)

    @property
    def tensor_parallel(self) -> bool:
        """Whether tensor-parallel ranks hold different shards; otherwise they hold copies."""
        return self.sharding.shard_dim is not None


@dataclass(frozen=True)
class _Weight:
    """A parameter of a component, named within one tower's module."""

    name: str
    sharding: ParameterSharding
    experts: int = 0
    """Number of experts that a rank holds; 0 for any other parameter."""
    auxiliary: bool = False


def _weight(
    name: str, *shape: int, split: int | None = None, experts: int = 0, auxiliary: bool = False
) -> _Weight:
    """Return a weight of a global shape; tensor parallelism splits dimension ``split``."""
    return _Weight(name, ParameterSharding(shape, split), experts, auxiliary)


def held_parameters(config: Config, stage: int, towers: Sequence[int]) -> list[HeldParameter]:
    """List the parameters of a rank of pipeline stage ``stage`` that holds ``towers`` (ascending).

    Shards have the same shapes on all ranks of a tensor-parallel group and of an expert-parallel
    group.

    Raises:
        ConfigError: the vocabulary size is not resolved.
    """
    model, parallel = config.model, config.parallel
    tensor, expert = parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size
    pieces = pieces_of_stage(config, stage)
    first, last = pieces[0].first, pieces[-1].last
    held: list[HeldParameter] = []
    if first:
        held.append(_vocabulary_matrix(model, tensor, "embedding.lookup.weight"))
        held += _latent_entries(model, towers)
    for piece in pieces:
        for index in piece.layers:
            held += _layer(model, index, towers, tensor, expert)
    if last:
        held += _final_norm(model, towers, tensor)
        own_weight = model.untie_embeddings_and_output_weights
        if own_weight:
            held.append(_vocabulary_matrix(model, tensor, "head.linear.weight"))
        held += _latent_exits(model, towers)
        if not own_weight and not first:
            held.append(_vocabulary_matrix(model, tensor, "embedding.lookup.weight", replica=True))
    return held


def is_frozen(model: ModelConfig, name: str) -> bool:
    """Return whether a parameter, or one expert's part of it, is not trained, by its name."""
    place = name.partition(".towers.")[2]
    return bool(place) and model.frozen_towers[int(place.partition(".")[0])]


def layer_parameters(model: ModelConfig) -> list[HeldParameter]:
    """List the unsharded parameters of one layer, of all towers; layers are alike."""
    return list(_layer(model, 0, range(model.num_towers), tensor=1, expert=1))


def outer_parameters(model: ModelConfig) -> list[HeldParameter]:
    """List the unsharded parameters outside the layers: embedding, heads and final norm.

    Raises:
        ConfigError: the vocabulary size is not resolved.
    """
    matrices = [_vocabulary_matrix(model, 1, "embedding.lookup.weight")]
    if model.untie_embeddings_and_output_weights:
        matrices.append(_vocabulary_matrix(model, 1, "head.linear.weight"))
    towers = range(model.num_towers)
    latents = (*_latent_entries(model, towers), *_latent_exits(model, towers))
    return [*matrices, *_final_norm(model, towers, 1), *latents]


def _latent_entries(model: ModelConfig, towers: Sequence[int]) -> Iterator[HeldParameter]:
    h = model.hidden_size
    shapes = {"time_hidden": (h, 2 * FREQUENCIES), "time": (h, h)}
    for name, tower, width in _vectors(model, towers):
        for weight, shape in {"vector": (h, width), **shapes}.items():
            sharding = ParameterSharding(shape)
            yield HeldParameter(f"latent_entries.{name}.{weight}", shape, tower, sharding)


def _latent_exits(model: ModelConfig, towers: Sequence[int]) -> Iterator[HeldParameter]:
    for name, tower, width in _vectors(model, towers):
        shape = (width, model.hidden_size)
        sharding = ParameterSharding(shape)
        yield HeldParameter(f"latent_exits.{name}.vector", shape, tower, sharding)


def _vectors(model: ModelConfig, towers: Sequence[int]) -> Iterator[tuple[str, int, int]]:
    """Yield name, tower and width of the modalities of vectors in ``towers``."""
    of_modalities = dict(zip(model.modalities, model.towers_of_modalities, strict=True))
    for name, width in model.widths.items():
        if of_modalities[name] in towers:
            yield name, of_modalities[name], width


def _layer(
    model: ModelConfig, index: int, towers: Sequence[int], tensor: int, expert: int
) -> Iterator[HeldParameter]:
    """Yield one layer's parameters, sharded over ``tensor`` and ``expert`` parallel ranks."""
    h, d, untied = model.hidden_size, model.head_dim, model.untied
    heads, groups = model.num_attention_heads, model.num_key_value_heads
    qkv = [_weight("linear.weight", (heads + 2 * groups) * d, h, split=0)]
    if model.add_qkv_bias:
        qkv.append(_weight("linear.bias", (heads + 2 * groups) * d, split=0))
    output = _weight("linear.weight", h, heads * d, split=1)
    qk_norm = [_weight("weight", d)] if model.qk_norm else []
    norm = _weight("weight", h)
    networks = {
        tower: _feed_forward(model, model.experts_of_towers[tower], expert) for tower in towers
    }
    components = {
        "attention.qkv": (_alike(qkv, towers), untied.qkv),
        "attention.q_norm": (_alike(qk_norm, towers), untied.qk_norm),
        "attention.k_norm": (_alike(qk_norm, towers), untied.qk_norm),
        "attention.output_projection": (_alike([output], towers), untied.output_projection),
        "attention_norm": (_alike([norm], towers), untied.norms),
        "feed_forward": (networks, untied.feed_forward),
        "feed_forward_norm": (_alike([norm], towers), untied.norms),
    }
    for component, (weights, is_untied) in components.items():
        yield from _per_tower(model, f"layers.{index}.{component}", weights, is_untied, tensor)


def _feed_forward(model: ModelConfig, experts: ExpertsConfig | None, expert: int) -> list[_Weight]:
    """List a tower's feed-forward weights; for a mixture, its router and a rank's experts."""
    h, f = model.hidden_size, model.feed_forward_size
    if experts is None:
        return [
            _weight("gate_up.linear.weight", 2, f, h, split=1),
            _weight("down.linear.weight", h, f, split=1),
        ]
    number = experts.num_moe_experts
    held = number // expert
    causal = [
        _weight("router.causal.hidden", h // 2, h, auxiliary=True),
        _weight("router.causal.output", number, h // 2, auxiliary=True),
    ]
    return [
        _weight("router.weight", number, h),
        *(causal if experts.causal_router else []),
        _weight("experts.gate_up", 2, f, h, split=1, experts=held),
        _weight("experts.down", h, f, split=1, experts=held),
    ]


def _alike(weights: Sequence[_Weight], towers: Sequence[int]) -> dict[int, Sequence[_Weight]]:
    """Return the same weights for every tower."""
    return dict.fromkeys(towers, weights)


def _per_tower(
    model: ModelConfig,
    component: str,
    weights: Mapping[int, Sequence[_Weight]],
    untied: bool,
    tensor: int,
) -> Iterator[HeldParameter]:
    """Yield a component's weights once per held tower, or once in all if it is shared."""
    places = {tower: f"towers.{tower}" for tower in weights}
    for tower, place in places.items() if untied else [(next(iter(weights)), "shared")]:
        for weight in weights[tower]:
            yield HeldParameter(
                f"{component}.{place}.{weight.name}",
                weight.sharding.parameter_shape(tensor, weight.experts or 1),
                tower if untied else SHARED,
                weight.sharding,
                experts=weight.experts,
                auxiliary=weight.auxiliary,
                frozen=untied and model.frozen_towers[tower],
            )


def _final_norm(model: ModelConfig, towers: Sequence[int], tensor: int) -> Iterator[HeldParameter]:
    norm = _weight("weight", model.hidden_size)
    untied = model.untied.final_norm
    return _per_tower(model, "final_norm", _alike([norm], towers), untied, tensor)


def _vocabulary_matrix(
    model: ModelConfig, tensor: int, name: str, replica: bool = False
) -> HeldParameter:
    sharding = ParameterSharding((model.num_vocabulary_rows, model.hidden_size), shard_dim=0)
    return HeldParameter(name, sharding.parameter_shape(tensor), SHARED, sharding, replica=replica)
