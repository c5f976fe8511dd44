"""Which parameters a rank holds, from the configuration alone: nothing is built.

The list equals ``named_parameters()`` of the model that the rank would build, in its order, so that
memory and ownership in layouts of any size can be told on one machine. Letters: h hidden size, d
head size, f feed-forward width, V vocabulary rows, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mot_megatron.config import Config, ExpertsConfig
from mot_megatron.model.pieces import pieces_of_stage
from mot_megatron.model.sharding import SHARED


@dataclass(frozen=True)
class HeldParameter:
    """One rank's part of one parameter."""

    name: str
    """The same on all ranks that hold a part of it."""
    shape: tuple[int, ...]
    """Of this rank's part."""
    tower: int
    """The tower that it belongs to, or SHARED."""
    tensor_parallel: bool
    """Whether tensor-parallel ranks hold different parts; they hold the same otherwise."""
    replica: bool = False
    """Whether it is a copy of another pipeline stage's: a tied embedding on the last stage."""
    experts: bool = False
    """Whether it stacks experts; the ranks of an expert-parallel group hold different ones."""

    @property
    def size(self) -> int:
        """Elements on this rank."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class _Weight:
    """A parameter of a component, within the module of one tower."""

    name: str
    shape: tuple[int, ...]
    tensor_parallel: bool
    experts: bool = False


def held_parameters(config: Config, stage: int, towers: Sequence[int]) -> list[HeldParameter]:
    """Parameters of a rank of pipeline stage ``stage`` that holds ``towers`` (ascending).

    Ranks of a tensor-parallel group hold parts of the same shapes, and so do those of an
    expert-parallel group.

    Raises:
        ConfigError: the vocabulary is not resolved.
    """
    model = config.model
    pieces = pieces_of_stage(config, stage)
    first, last = pieces[0].first, pieces[-1].last
    tied = not model.untie_embeddings_and_output_weights
    held: list[HeldParameter] = []
    if first:
        held.append(_vocabulary_matrix(config, "embedding.lookup.weight"))
    for piece in pieces:
        for index in piece.layers:
            held += _layer(config, index, towers)
    if last:
        norm = _Weight("weight", (model.hidden_size,), tensor_parallel=False)
        held += _alike("final_norm", [norm], towers, model.untied.final_norm)
        if not tied:
            held.append(_vocabulary_matrix(config, "head.linear.weight"))
        elif not first:
            held.append(_vocabulary_matrix(config, "embedding.lookup.weight", replica=True))
    return held


def _layer(config: Config, index: int, towers: Sequence[int]) -> Iterator[HeldParameter]:
    model, tensor = config.model, config.parallel.tensor_model_parallel_size
    h, d, untied = model.hidden_size, model.head_dim, model.untied
    heads, groups = model.num_attention_heads, model.num_key_value_heads
    qkv = _Weight("linear.weight", ((heads + 2 * groups) * d // tensor, h), tensor_parallel=True)
    output = _Weight("linear.weight", (h, heads * d // tensor), tensor_parallel=True)
    qk_norm = [_Weight("weight", (d,), tensor_parallel=False)] if model.qk_norm else []
    norm = _Weight("weight", (h,), tensor_parallel=False)
    networks = {tower: _feed_forward(config, model.experts_of_towers[tower]) for tower in towers}
    prefix = f"layers.{index}"
    yield from _alike(f"{prefix}.attention.qkv", [qkv], towers, untied.qkv)
    yield from _alike(f"{prefix}.attention.q_norm", qk_norm, towers, untied.qk_norm)
    yield from _alike(f"{prefix}.attention.k_norm", qk_norm, towers, untied.qk_norm)
    yield from _alike(
        f"{prefix}.attention.output_projection", [output], towers, untied.output_projection
    )
    yield from _alike(f"{prefix}.attention_norm", [norm], towers, untied.norms)
    yield from _per_tower(f"{prefix}.feed_forward", networks, untied.feed_forward)
    yield from _alike(f"{prefix}.feed_forward_norm", [norm], towers, untied.norms)


def _feed_forward(config: Config, experts: ExpertsConfig | None) -> list[_Weight]:
    """A tower's network, or its mixture of them: the router, then this rank's experts stacked."""
    parallel, h = config.parallel, config.model.hidden_size
    f = config.model.feed_forward_size // parallel.tensor_model_parallel_size
    if experts is None:
        return [
            _Weight("gate_up.linear.weight", (2 * f, h), tensor_parallel=True),
            _Weight("down.linear.weight", (h, f), tensor_parallel=True),
        ]
    number = experts.num_moe_experts
    held = number // parallel.expert_model_parallel_size
    causal = [
        _Weight("router.causal.hidden", (h // 2, h), tensor_parallel=False),
        _Weight("router.causal.output", (number, h // 2), tensor_parallel=False),
    ]
    return [
        _Weight("router.weight", (number, h), tensor_parallel=False),
        *(causal if experts.causal_router else []),
        _Weight("experts.gate_up", (held * 2 * f, h), tensor_parallel=True, experts=True),
        _Weight("experts.down", (held * h, f), tensor_parallel=True, experts=True),
    ]


def _alike(
    component: str, weights: Sequence[_Weight], towers: Sequence[int], untied: bool
) -> Iterator[HeldParameter]:
    """A component whose weights have the same shapes in every tower."""
    return _per_tower(component, dict.fromkeys(towers, weights), untied)


def _per_tower(
    component: str, weights: Mapping[int, Sequence[_Weight]], untied: bool
) -> Iterator[HeldParameter]:
    """A component's weights of every tower held, or of one for all."""
    places = {tower: f"towers.{tower}" for tower in weights}
    for tower, place in places.items() if untied else [(next(iter(weights)), "shared")]:
        for weight in weights[tower]:
            yield HeldParameter(
                f"{component}.{place}.{weight.name}",
                weight.shape,
                tower if untied else SHARED,
                weight.tensor_parallel,
                experts=weight.experts,
            )


def _vocabulary_matrix(config: Config, name: str, replica: bool = False) -> HeldParameter:
    model, tensor = config.model, config.parallel.tensor_model_parallel_size
    shape = (model.num_vocabulary_rows // tensor, model.hidden_size)
    return HeldParameter(name, shape, SHARED, tensor_parallel=True, replica=replica)
