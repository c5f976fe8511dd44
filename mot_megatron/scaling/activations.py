"""Activations in closed form: the bytes that autograd keeps for backward, at their most.

Counted is what each operation saves: linear layers their input, RMSNorm its input (and on a CPU,
which has no fused kernel, the normalised rows, both in fp32), SwiGLU its two halves and silu's
result, attention q, k, v, its output and the softmax's divisors, the loss the softmax. Tensors
that live within an operation, and buffers of collectives and messages, come on top.

Letters: g rows of the stream, a attended positions, both of one micro-batch on one rank; h hidden
size, d head size, f feed-forward width, H query heads and G key-value heads that a tensor-parallel
rank projects (H', G' those that it attends with), V vocabulary rows, all but h and d divided by the
tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mot_megatron.config import Config
from mot_megatron.model.pieces import Piece, pieces_of_stage

FP32, INT64 = 4, 8
Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Rows:
    """How much of a micro-batch a rank works on."""

    stream: int
    """g: slots of the towers that it holds, before sequence parallelism cuts them."""
    attended: int
    """a: positions of the sequences that it attends for."""


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
    f: int
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

    @classmethod
    def of(cls, config: Config, rows: Rows, device: Device) -> _Sizes:
        model, parallel = config.model, config.parallel
        tensor, modality = parallel.tensor_model_parallel_size, parallel.modality_parallel_size
        heads, groups = model.num_attention_heads // tensor, model.num_key_value_heads // tensor
        slices = modality if parallel.attention_exchange == "heads" else 1
        return cls(
            g=rows.stream,
            s=rows.stream // tensor if parallel.sequence_parallel else rows.stream,
            a=rows.attended,
            h=model.hidden_size,
            d=model.head_dim,
            f=model.feed_forward_size // tensor,
            heads=heads,
            groups=groups,
            attended_heads=heads // slices,
            attended_groups=max(groups // slices, 1),
            vocabulary=model.num_vocabulary_rows // tensor,
            element=2 if config.training.precision == "bf16" else FP32,
            tensor_parallel=tensor > 1,
            exchanged=modality > 1,
            in_place=modality == 1 and model.num_towers == 1,
            fused_norm=device == "cuda",
        )


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
        again = max(0, core - 4 * z.g * z.f * z.element)
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
    linear_inputs = 2 * stream * e
    projection = z.g * z.heads * z.d * e
    feed_forward = 4 * z.g * z.f * e  # gate and up, silu(gate), their product
    attention = _qkv(z, config.model.qk_norm, core_kept) + _core(z, core_kept)
    return norms + linear_inputs + projection + feed_forward + attention


def _qkv(z: _Sizes, normed: bool, core_kept: bool) -> int:
    """The projection's result, norms of queries and keys, and what of them attention keeps."""
    result = z.g * (z.heads + 2 * z.groups) * z.d * z.element
    rows = z.g * (z.heads + z.groups)
    # The norms' input is a part of the result, unless a kernel has widened it.
    is_kept = z.in_place or (normed and (z.fused_norm or z.element == FP32))
    total = result if is_kept else 0
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
