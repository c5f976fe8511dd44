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

from mot_megatron.config import Config, ExpertsConfig, ModelConfig
from mot_megatron.model.pieces import pieces_of_stage
from mot_megatron.model.sharding import SHARED


@dataclass(frozen=True)
class HeldParameter:
    """One rank's shard of one parameter."""

    name: str
    """Global name: the same on all ranks that hold a shard."""
    shape: tuple[int, ...]
    """Shape of this rank's shard."""
    tower: int
    """Index of the tower that owns the parameter, or SHARED."""
    tensor_parallel: bool
    """Whether tensor-parallel ranks hold different shards; otherwise they hold copies."""
    replica: bool = False
    """Whether it copies another pipeline stage's parameter: a tied embedding on the last stage."""
    experts: int = 0
    """Number of experts stacked in it; 0 for any other parameter."""
    auxiliary: bool = False
    """Whether it is trained beside the model without influencing it: a causal router."""

    @property
    def size(self) -> int:
        """Elements on this rank."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class _Weight:
    """A parameter of a component, named within one tower's module."""

    name: str
    shape: tuple[int, ...]
    tensor_parallel: bool = False
    experts: int = 0
    auxiliary: bool = False


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
    for piece in pieces:
        for index in piece.layers:
            held += _layer(model, index, towers, tensor, expert)
    if last:
        held += _final_norm(model, towers)
        if model.untie_embeddings_and_output_weights:
            held.append(_vocabulary_matrix(model, tensor, "head.linear.weight"))
        elif not first:
            held.append(_vocabulary_matrix(model, tensor, "embedding.lookup.weight", replica=True))
    return held


def layer_parameters(model: ModelConfig) -> list[HeldParameter]:
    """List the unsharded parameters of one layer, of all towers; layers are alike."""
    return list(_layer(model, 0, range(model.num_towers), tensor=1, expert=1))


def outer_parameters(model: ModelConfig) -> list[HeldParameter]:
    """List the unsharded parameters outside the layers: embedding, head and final norm.

    Raises:
        ConfigError: the vocabulary size is not resolved.
    """
    matrices = [_vocabulary_matrix(model, 1, "embedding.lookup.weight")]
    if model.untie_embeddings_and_output_weights:
        matrices.append(_vocabulary_matrix(model, 1, "head.linear.weight"))
    return [*matrices, *_final_norm(model, range(model.num_towers))]


def _layer(
    model: ModelConfig, index: int, towers: Sequence[int], tensor: int, expert: int
) -> Iterator[HeldParameter]:
    """Yield one layer's parameters, sharded over ``tensor`` and ``expert`` parallel ranks."""
    h, d, untied = model.hidden_size, model.head_dim, model.untied
    heads, groups = model.num_attention_heads, model.num_key_value_heads
    width = (heads + 2 * groups) * d // tensor
    qkv = [_Weight("linear.weight", (width, h), tensor_parallel=True)]
    if model.add_qkv_bias:
        qkv.append(_Weight("linear.bias", (width,), tensor_parallel=True))
    output = _Weight("linear.weight", (h, heads * d // tensor), tensor_parallel=True)
    qk_norm = [_Weight("weight", (d,))] if model.qk_norm else []
    norm = _Weight("weight", (h,))
    networks = {
        tower: _feed_forward(model, model.experts_of_towers[tower], tensor, expert)
        for tower in towers
    }
    prefix = f"layers.{index}"
    yield from _alike(f"{prefix}.attention.qkv", qkv, towers, untied.qkv)
    yield from _alike(f"{prefix}.attention.q_norm", qk_norm, towers, untied.qk_norm)
    yield from _alike(f"{prefix}.attention.k_norm", qk_norm, towers, untied.qk_norm)
    yield from _alike(
        f"{prefix}.attention.output_projection", [output], towers, untied.output_projection
    )
    yield from _alike(f"{prefix}.attention_norm", [norm], towers, untied.norms)
    yield from _per_tower(f"{prefix}.feed_forward", networks, untied.feed_forward)
    yield from _alike(f"{prefix}.feed_forward_norm", [norm], towers, untied.norms)


def _feed_forward(
    model: ModelConfig, experts: ExpertsConfig | None, tensor: int, expert: int
) -> list[_Weight]:
    """List a tower's feed-forward weights; for a mixture, its router and this rank's experts."""
    h, f = model.hidden_size, model.feed_forward_size // tensor
    if experts is None:
        return [
            _Weight("gate_up.linear.weight", (2 * f, h), tensor_parallel=True),
            _Weight("down.linear.weight", (h, f), tensor_parallel=True),
        ]
    number = experts.num_moe_experts
    held = number // expert
    causal = [
        _Weight("router.causal.hidden", (h // 2, h), auxiliary=True),
        _Weight("router.causal.output", (number, h // 2), auxiliary=True),
    ]
    return [
        _Weight("router.weight", (number, h)),
        *(causal if experts.causal_router else []),
        _Weight("experts.gate_up", (held * 2 * f, h), tensor_parallel=True, experts=held),
        _Weight("experts.down", (held * h, f), tensor_parallel=True, experts=held),
    ]


def _alike(
    component: str, weights: Sequence[_Weight], towers: Sequence[int], untied: bool
) -> Iterator[HeldParameter]:
    """Yield a component whose weights have the same shapes in every tower."""
    return _per_tower(component, dict.fromkeys(towers, weights), untied)


def _per_tower(
    component: str, weights: Mapping[int, Sequence[_Weight]], untied: bool
) -> Iterator[HeldParameter]:
    """Yield a component's weights once per held tower, or once in all if it is shared."""
    places = {tower: f"towers.{tower}" for tower in weights}
    for tower, place in places.items() if untied else [(next(iter(weights)), "shared")]:
        for weight in weights[tower]:
            yield HeldParameter(
                f"{component}.{place}.{weight.name}",
                weight.shape,
                tower if untied else SHARED,
                weight.tensor_parallel,
                experts=weight.experts,
                auxiliary=weight.auxiliary,
            )


def _final_norm(model: ModelConfig, towers: Sequence[int]) -> Iterator[HeldParameter]:
    norm = _Weight("weight", (model.hidden_size,))
    return _alike("final_norm", [norm], towers, model.untied.final_norm)


def _vocabulary_matrix(
    model: ModelConfig, tensor: int, name: str, replica: bool = False
) -> HeldParameter:
    shape = (model.num_vocabulary_rows // tensor, model.hidden_size)
    return HeldParameter(name, shape, SHARED, tensor_parallel=True, replica=replica)
