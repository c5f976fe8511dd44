"""Activations in closed form: the bytes that autograd keeps for backward, at their most.

Counted is what each operation saves: linear layers their input, RMSNorm its input (and on a CPU,
which has no fused kernel, the normalized rows, both in fp32), SwiGLU its two halves and silu's
result, attention q, k, v, its output and the softmax's divisors, the loss the softmax. Tensors
that live within an operation, and buffers of collectives and messages, come on top.

Of a mixture of experts it is what balanced experts keep: every tower's token runs through the mean
number of them. Expert choice balances the experts of a micro-batch exactly; where expert
parallelism brings a rank other ranks' tokens, those are taken to be as many as its own; top-k
without a capacity promises nothing, and in the worst case one rank's experts get all tokens.

Letters: g rows of the stream, a attended positions, both of one micro-batch on one rank; h hidden
size, d head size, f feed-forward width, H query heads and G key-value heads that a tensor-parallel
rank projects (H', G' those that it attends with), V vocabulary rows, all but h and d divided by the
tensor-parallel size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mot_megatron.config import Config, ExpertsConfig
from mot_megatron.model.pieces import Piece, pieces_of_stage

FP32, INT64 = 4, 8
Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Rows:
    """How much of a micro-batch a rank works on."""

    towers: tuple[int, ...]
    """Slots of every tower, none of those that it does not hold, before sequence parallelism cuts
    them."""
    attended: int
    """a: positions of the sequences that it attends for."""

    @property
    def stream(self) -> int:
        """g: slots of all towers that it holds."""
        return sum(self.towers)


def activation_bytes(
    config: Config,
    stage: int,
    rows: Rows,
    micro_batches: int,
    device: Device = "cuda",
) -> int:
    """The most that is kept at one time on a rank of a pipeline stage.

    Without a pipeline one micro-batch is kept at a time. With one, as many as the schedule has
    begun and not ended.

    Args:
        config: Resolved.
        stage: The rank's.
        rows: Of every micro-batch; of the largest, where they differ.
        micro_batches: Per optimizer step.
        device: Where the model would run; its kernels keep different things.
    """
    sizes = _Sizes.of(config, rows, device)
    pieces = pieces_of_stage(config, stage)
    stages = config.parallel.pipeline_model_parallel_size
    events = _schedule(stage, stages, len(pieces), micro_batches)
    kept = [_piece_bytes(config, piece, sizes) for piece in pieces]
    return _peak(events, kept)


@dataclass(frozen=True)
class _PieceBytes:
    """What a micro-batch's pass through a piece keeps."""

    until_backward: int
    head: int
    """The part of it that the head and the loss keep, which is gone when layers run backward."""
    again: int
    """What one layer keeps on top while backward computes it again."""


@dataclass(frozen=True)
class _Sizes:
    """The letters, and the bytes of an element."""

    g: int
    s: int
    """Rows of the stream between the linear layers: g / tp under sequence parallelism."""
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
    """Whether q, k and v arrive in one buffer, of which v stays a part."""
    in_place: bool
    """Whether v stays a part of the projection's result: with one tower nothing is reordered."""
    fused_norm: bool
    feed_forward_inputs: int
    """Bytes that the towers' networks keep of what they are given, in a layer."""
    feed_forward: int
    """Bytes that they keep besides."""

    @classmethod
    def of(cls, config: Config, rows: Rows, device: Device) -> _Sizes:
        model, parallel = config.model, config.parallel
        tensor, modality = parallel.tensor_model_parallel_size, parallel.modality_parallel_size
        heads, groups = model.num_attention_heads // tensor, model.num_key_value_heads // tensor
        slices = modality if parallel.attention_exchange == "heads" else 1
        networks = [
            _feed_forward(config, experts, slots)
            for experts, slots in zip(model.experts_of_towers, rows.towers, strict=True)
        ]
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
        )


def _element(config: Config) -> int:
    return 2 if config.training.precision == "bf16" else FP32


def _cut(config: Config, slots: int) -> int:
    """Rows of the stream between the linear layers: sequence parallelism cuts them."""
    parallel = config.parallel
    return slots // parallel.tensor_model_parallel_size if parallel.sequence_parallel else slots


def _feed_forward(config: Config, experts: ExpertsConfig | None, slots: int) -> tuple[int, int]:
    """What a tower's network keeps of its input, and besides, for so many slots."""
    e, h, s = _element(config), config.model.hidden_size, _cut(config, slots)
    f = config.model.feed_forward_size // config.parallel.tensor_model_parallel_size
    swiglu = 4 * f * e  # of a row: gate and up, silu(gate), their product
    if experts is None:
        return s * h * e, slots * swiglu
    # The router reads the input in fp32 and keeps, of a row and an expert, the gate and whether
    # it is open; the causal one reads it as it is.
    inputs = s * h * FP32
    router = s * experts.num_moe_experts * (FP32 + 1)
    if experts.causal_router:
        inputs += s * h * e if e != FP32 else 0
        router += s * (h * e + 3 * experts.num_moe_experts * FP32)
    routed = math.ceil(experts.experts_per_token * slots)
    # Of a routed row its input, its output before it is weighted, the weight and its place.
    return inputs, router + routed * (swiglu + 2 * h * e + FP32 + INT64)


def _piece_bytes(config: Config, piece: Piece, z: _Sizes) -> _PieceBytes:
    recompute, layers = config.training.recompute, len(piece.layers)
    whole = _layer(config, z, core_kept=True)
    angles = 2 * z.a * z.d * z.element  # of the rotary embedding, which all layers share
    if recompute == "full":
        layer = z.s * z.h * z.element
        again = whole - layer + angles
    elif recompute == "selective":
        layer = _layer(config, z, core_kept=False)
        core = z.a * (2 * z.attended_heads + z.attended_groups) * z.d * z.element + angles
        # By then the layer's feed-forward network has run backward.
        again = max(0, core - z.feed_forward)
    else:
        layer, again = whole, 0
    head = _head(z) if piece.last else 0
    kept = layers * layer + head
    if recompute == "none":
        kept += angles
    if piece.first:
        kept += z.g * (INT64 + int(z.tensor_parallel))  # token ids; which are other ranks'
    return _PieceBytes(kept, head, again)


def _layer(config: Config, z: _Sizes, core_kept: bool) -> int:
    """One layer; without ``core_kept`` attention keeps its inputs alone."""
    e, stream = z.element, z.s * z.h
    norms = 2 * _norm(z, stream, z.s)
    # Post-norm: the two linear layers keep the stream; pre-norm: they keep the norms' results.
    linear_inputs = stream * e + z.feed_forward_inputs
    projection = z.g * z.heads * z.d * e
    attention = _qkv(z, config.model.qk_norm, core_kept) + _core(z, core_kept)
    return norms + linear_inputs + projection + z.feed_forward + attention


def _qkv(z: _Sizes, normed: bool, core_kept: bool) -> int:
    """The projection's result, norms of queries and keys, and what of them attention keeps."""
    result = z.g * (z.heads + 2 * z.groups) * z.d * z.element
    rows = z.g * (z.heads + z.groups)
    # The norms' input is a part of the result, unless a kernel has widened it.
    is_recorded = z.in_place or (normed and (z.fused_norm or z.element == FP32))
    total = result if is_recorded else 0
    if normed:
        total += _norm(z, rows * z.d, rows)
        if z.fused_norm or z.element == FP32:
            total -= rows * z.d * z.element
    if z.in_place and not core_kept:
        # What attention is computed again from: the norms' results, or queries that were copied
        # together out of groups.
        copied = z.g * z.heads if 1 < z.groups < z.heads else 0
        total += (rows if normed else copied) * z.d * z.element
    return total


def _norm(z: _Sizes, elements: int, rows: int) -> int:
    """An RMSNorm, its input included."""
    if z.fused_norm:
        return elements * z.element + rows * FP32
    return 2 * elements * FP32 + rows * FP32


def _core(z: _Sizes, kept: bool) -> int:
    """Attention without what it shares with the projections."""
    arrived = z.attended_heads + 2 * z.attended_groups
    rotated = z.attended_heads + z.attended_groups
    if not kept:
        return 0 if z.in_place else z.a * arrived * z.d * z.element
    values = 0 if z.in_place else arrived if z.exchanged else z.attended_groups
    elements = z.a * (rotated + values + z.attended_heads) * z.d
    return elements * z.element + z.a * z.attended_heads * FP32


def _head(z: _Sizes) -> int:
    """Final norm, projection to the vocabulary and loss."""
    per_row = z.vocabulary * FP32 + INT64 + 2 * FP32 + 1  # softmax, targets, log Z, weights, mask
    return _norm(z, z.s * z.h, z.s) + z.s * z.h * z.element + z.g * per_row


def _schedule(stage: int, stages: int, pieces: int, micro_batches: int) -> list[tuple[int, bool]]:
    """The order of (piece, forward?) on a stage: 1F1B, or megatron's interleaving of it."""
    total = micro_batches * pieces
    ahead = stages - stage - 1
    if pieces > 1:
        ahead = 2 * ahead + (pieces - 1) * stages
    ahead = min(ahead, total)

    def piece(index: int) -> int:
        """A round takes one micro-batch per stage through all pieces."""
        return index // stages % pieces if pieces > 1 else 0

    events = [(piece(index), True) for index in range(ahead)]
    for index in range(total):
        if index + ahead < total:
            events.append((piece(index + ahead), True))
        events.append((pieces - 1 - piece(index), False))
    return events


def _peak(events: Sequence[tuple[int, bool]], kept: Sequence[_PieceBytes]) -> int:
    now = peak = 0
    for piece, is_forward in events:
        bytes_ = kept[piece]
        if is_forward:
            now += bytes_.until_backward
            peak = max(peak, now)
        else:
            peak = max(peak, now - bytes_.head + bytes_.again)
            now -= bytes_.until_backward
    return peak
