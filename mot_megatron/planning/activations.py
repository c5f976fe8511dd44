"""Activation memory in closed form: the peak of the bytes that autograd saves for backward.

This counts what each operation saves: a linear layer its input; RMSNorm its input (and on a CPU,
which has no fused kernel, the normalized rows, both in fp32); SwiGLU its two halves and the result
of silu; attention q, k, v, its output and the softmax normalizers; head and loss their gradients.
What is saved for the gradient of a weight alone is not saved in a frozen tower: the input of a
linear layer and the normalized rows.
Temporary tensors within an operation, and buffers for communication, are not counted.

For experts, the load is assumed to be balanced: each token of a tower uses the mean number of
experts. Expert choice balances each micro-batch exactly. With expert parallelism, a rank is assumed
to receive as many tokens from other ranks as it sends to them. Top-k without a capacity guarantees
nothing; in the worst case, the experts of one rank get all tokens.

Letters: g rows of the residual stream and a attended positions of one micro-batch on one rank; h
hidden size, d head size, f feed-forward width, H query heads and G key-value heads that a
tensor-parallel rank projects (H', G' those with which it attends), V vocabulary rows. All except h
and d are divided by the tensor-parallel size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mot_megatron.config import Config
from mot_megatron.config_model import ExpertsConfig
from mot_megatron.model.pieces import Piece, pieces_of_stage

FP32, INT64 = 4, 8
Device = Literal["cpu", "cuda"]
DEVICES: tuple[Device, ...] = ("cpu", "cuda")


@dataclass(frozen=True)
class Rows:
    """The part of a micro-batch that a rank processes."""

    towers: tuple[int, ...]
    """Slots of each tower, before sequence parallelism divides them; 0 for towers that the rank
    does not hold."""
    attended: int
    """a: positions for which the rank computes attention."""

    @property
    def stream(self) -> int:
        """g: slots of all towers."""
        return sum(self.towers)


def activation_bytes(
    config: Config,
    stage: int,
    rows: Rows,
    micro_batches: int,
    device: Device = "cuda",
) -> int:
    """Return the peak of saved bytes on a rank.

    Without pipeline parallelism, a rank stores the activations of one micro-batch at a time. With
    it, a rank stores those of every micro-batch that the schedule has begun and not finished.

    Args:
        config: Resolved configuration.
        stage: Pipeline stage of the rank.
        rows: Size of each micro-batch, or of the largest.
        micro_batches: Micro-batches per optimizer step.
        device: Device of the model, whose kernels save different tensors.
    """
    sizes = _Sizes.of(config, rows, device)
    pieces = pieces_of_stage(config, stage)
    stages = config.parallel.pipeline_model_parallel_size
    events = _schedule(stage, stages, len(pieces), micro_batches)
    saved = [_piece_bytes(config, piece, sizes) for piece in pieces]
    return _peak(events, saved)


@dataclass(frozen=True)
class _PieceBytes:
    """Bytes saved by the pass of a micro-batch through a piece."""

    until_backward: int
    """All bytes that are saved until the backward pass."""
    head: int
    """The part saved by head and loss, which is freed before the layers run backward."""
    recomputed: int
    """Additional bytes that one layer saves while the backward pass recomputes it."""


@dataclass(frozen=True)
class _Sizes:
    """The values of the letters, and the bytes per element."""

    g: int
    s: int
    """Rows of the stream between the linear layers: g / TP with sequence parallelism."""
    a: int
    h: int
    d: int
    heads: int
    groups: int
    attended_heads: int
    attended_groups: int
    vocabulary: int
    element: int
    tensor_parallel: bool
    exchanged: bool
    """Whether q, k and v arrive in one buffer, of which v remains a view."""
    in_place: bool
    """Whether v remains a view of the projection's result, since one tower needs no reordering."""
    fused_norm: bool
    feed_forward_inputs: int
    """Bytes per layer that the feed-forward networks save of their inputs."""
    feed_forward: int
    """Other bytes per layer that they save."""
    frozen: int
    """The part of g in frozen towers."""
    frozen_s: int
    """The part of s in frozen towers."""

    @classmethod
    def of(cls, config: Config, rows: Rows, device: Device) -> _Sizes:
        model, parallel = config.model, config.parallel
        tensor, modality = parallel.tensor_model_parallel_size, parallel.modality_parallel_size
        heads, groups = model.num_attention_heads // tensor, model.num_key_value_heads // tensor
        slices = modality if parallel.attention_exchange == "heads" else 1
        networks = [
            _feed_forward(config, experts, slots, is_frozen and model.untied.feed_forward)
            for experts, slots, is_frozen in zip(
                model.experts_of_towers, rows.towers, model.frozen_towers, strict=True
            )
        ]
        frozen = sum(
            slots for slots, held in zip(rows.towers, model.frozen_towers, strict=True) if held
        )
        return cls(
            g=rows.stream,
            s=_cut(config, rows.stream),
            a=rows.attended,
            h=model.hidden_size,
            d=model.head_dim,
            heads=heads,
            groups=groups,
            attended_heads=heads // slices,
            attended_groups=max(groups // slices, 1),
            vocabulary=model.num_vocabulary_rows // tensor,
            element=_element(config),
            tensor_parallel=tensor > 1,
            exchanged=modality > 1,
            in_place=modality == 1 and model.num_towers == 1,
            fused_norm=device == "cuda",
            feed_forward_inputs=sum(inputs for inputs, _ in networks),
            feed_forward=sum(inner for _, inner in networks),
            frozen=frozen,
            frozen_s=_cut(config, frozen),
        )


def _element(config: Config) -> int:
    return 2 if config.training.precision == "bf16" else FP32


def _cut(config: Config, slots: int) -> int:
    """Return the rows between the linear layers, which sequence parallelism divides."""
    parallel = config.parallel
    return slots // parallel.tensor_model_parallel_size if parallel.sequence_parallel else slots


def _feed_forward(
    config: Config, experts: ExpertsConfig | None, slots: int, frozen: bool
) -> tuple[int, int]:
    """Return the bytes that a tower's network saves of its input, and other bytes it saves."""
    e, h, s = _element(config), config.model.hidden_size, _cut(config, slots)
    f = config.model.feed_forward_size // config.parallel.tensor_model_parallel_size
    # Per row: gate and up, silu(gate), and their product, which only the last matrix needs.
    swiglu = (3 if frozen else 4) * f * e
    if experts is None:
        return 0 if frozen else s * h * e, slots * swiglu
    # The router reads the input in fp32 and saves, per row and expert, the gate and whether the row
    # is assigned to the expert. The causal router reads the input in its own precision.
    inputs = 0 if frozen else s * h * FP32
    router = s * experts.num_moe_experts * (FP32 + 1)
    if experts.causal_router and not frozen:
        inputs += s * h * e if e != FP32 else 0
        router += s * (h * e + 3 * experts.num_moe_experts * FP32)
    routed = math.ceil(experts.experts_per_token * slots)
    # Per routed row: its input, its output before weighting, the weight and its position.
    rows = 1 if frozen else 2
    return inputs, router + routed * (swiglu + rows * h * e + FP32 + INT64)


def _piece_bytes(config: Config, piece: Piece, z: _Sizes) -> _PieceBytes:
    recompute, layers = config.training.recompute, len(piece.layers)
    whole = _layer(config, z, core_saved=True)
    angles = 2 * z.a * z.d * z.element  # of the rotary embedding, shared by all layers
    if recompute == "full":
        layer = z.s * z.h * z.element
        recomputed = whole - layer + angles
    elif recompute == "selective":
        layer = _layer(config, z, core_saved=False)
        core = z.a * (2 * z.attended_heads + z.attended_groups) * z.d * z.element + angles
        # The layer's feed-forward network has already run backward and freed its tensors.
        recomputed = max(0, core - z.feed_forward)
    else:
        layer, recomputed = whole, 0
    head = _head(config, z) if piece.last else 0
    saved = layers * layer + head
    if recompute == "none":
        saved += angles
    if piece.first:
        # Token ids, and with tensor parallelism a mask of other ranks' ids.
        saved += z.g * (INT64 + int(z.tensor_parallel))
    return _PieceBytes(saved, head, recomputed)


def _layer(config: Config, z: _Sizes, core_saved: bool) -> int:
    """Return the bytes of one layer; without ``core_saved``, attention saves only its inputs."""
    e, untied = z.element, config.model.untied
    norms = 2 * _norm(z, z.s * z.h, z.s, untied.norms * z.frozen_s * z.h)
    # The two linear layers save the stream (post-norm) or the results of the norms (pre-norm).
    linear_inputs = (z.s - untied.qkv * z.frozen_s) * z.h * e + z.feed_forward_inputs
    projection = (z.g - untied.output_projection * z.frozen) * z.heads * z.d * e
    attention = _qkv(config, z, core_saved) + _core(z, core_saved)
    return norms + linear_inputs + projection + z.feed_forward + attention


def _qkv(config: Config, z: _Sizes, core_saved: bool) -> int:
    """Return the bytes of the projection's result and of the norms of queries and keys."""
    normed = config.model.qk_norm
    result = z.g * (z.heads + 2 * z.groups) * z.d * z.element
    rows = z.g * (z.heads + z.groups)
    # The input of the norms is a view of the result, unless a kernel converts it to fp32.
    is_saved = z.in_place or (normed and (z.fused_norm or z.element == FP32))
    total = result if is_saved else 0
    if normed:
        frozen = config.model.untied.qk_norm * z.frozen * (z.heads + z.groups)
        total += _norm(z, rows * z.d, rows, frozen * z.d)
        if z.fused_norm or z.element == FP32:
            total -= rows * z.d * z.element
    if z.in_place and not core_saved:
        # Attention is recomputed from the results of the norms, or from queries that were copied
        # out of their groups.
        copied = z.g * z.heads if 1 < z.groups < z.heads else 0
        total += (rows if normed else copied) * z.d * z.element
    return total


def _norm(z: _Sizes, elements: int, rows: int, frozen: int) -> int:
    """Return the bytes of an RMSNorm, including its input; ``frozen`` of the elements."""
    if z.fused_norm:
        return elements * z.element + rows * FP32
    return (2 * elements - frozen) * FP32 + rows * FP32


def _core(z: _Sizes, saved: bool) -> int:
    """Return the bytes of attention, except tensors that it shares with the projections."""
    inputs = z.attended_heads + 2 * z.attended_groups
    rotated = z.attended_heads + z.attended_groups
    if not saved:
        return 0 if z.in_place else z.a * inputs * z.d * z.element
    values = 0 if z.in_place else inputs if z.exchanged else z.attended_groups
    elements = z.a * (rotated + values + z.attended_heads) * z.d
    return elements * z.element + z.a * z.attended_heads * FP32


def _head(config: Config, z: _Sizes) -> int:
    """Return the bytes of the final norm, the projection to the vocabulary and the loss."""
    # Forward computes the gradients, of all rows and of the weight, and saves nothing else.
    frozen = config.model.untied.final_norm * z.frozen_s * z.h
    norm = _norm(z, z.s * z.h, z.s, frozen)
    return norm + z.g * z.h * z.element + z.vocabulary * z.h * FP32


def _schedule(stage: int, stages: int, pieces: int, micro_batches: int) -> list[tuple[int, bool]]:
    """Return the order of (piece, is forward) on a stage, for 1F1B or the interleaved schedule."""
    total = micro_batches * pieces
    ahead = stages - stage - 1
    if pieces > 1:
        ahead = 2 * ahead + (pieces - 1) * stages
    ahead = min(ahead, total)

    def piece(index: int) -> int:
        """Return the piece; a round takes one micro-batch per stage through all pieces."""
        return index // stages % pieces if pieces > 1 else 0

    events = [(piece(index), True) for index in range(ahead)]
    for index in range(total):
        if index + ahead < total:
            events.append((piece(index + ahead), True))
        events.append((pieces - 1 - piece(index), False))
    return events


def _peak(events: Sequence[tuple[int, bool]], saved: Sequence[_PieceBytes]) -> int:
    now = peak = 0
    for piece, is_forward in events:
        bytes_ = saved[piece]
        if is_forward:
            now += bytes_.until_backward
            peak = max(peak, now)
        else:
            peak = max(peak, now - bytes_.head + bytes_.recomputed)
            now -= bytes_.until_backward
    return peak
