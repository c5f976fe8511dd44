"""The elementwise operations of a layer: plain PyTorch, or one kernel for several of them.

A layer calls them through ``LayerOperations``, so that it reads the same for all implementations.
Plain PyTorch is the reference; the Triton kernels are in ``mot_megatron.model.fused``.

Letters: K towers, g_k slots of tower k, t tokens, n rows, h hidden size, f feed-forward width, G
key-value heads, w units of each (its queries, its key, its value), d head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch
import torch.nn.functional as F

from mot_megatron.errors import ConfigError
from mot_megatron.model.grouping import Grouping
from mot_megatron.model.heads import HeadNorms, ProjectedHeads
from mot_megatron.model.rotary import RotaryAngles

RotatedHeads = Callable[
    [Sequence[torch.Tensor], ProjectedHeads, HeadNorms | None, Grouping, RotaryAngles],
    tuple[torch.Tensor, torch.Tensor, torch.Tensor],
]


@dataclass(frozen=True)
class LayerOperations:
    """An implementation of every operation; all have the same results up to rounding."""

    swiglu: Callable[[torch.Tensor], torch.Tensor]
    """[n, 2 f], gate and up -> silu(gate) * up, [n, f]."""
    norm_then_add: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
    """(update, residual, weight, eps) -> residual + rms_norm(update), [n, h]."""
    add_then_norm: Callable[
        [torch.Tensor, torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]
    ]
    """(update, residual, weight, eps) -> s = residual + update, and rms_norm(s), [n, h] each."""
    to_towers: Callable[[Grouping, torch.Tensor], tuple[torch.Tensor, ...]]
    """(grouping, rows [t, c]) -> K slices [g_k, c]; padding slots become zeros."""
    rotated_heads: RotatedHeads | None
    """(K projections [g_k, G w d], heads, norms, grouping, angles) -> q [t, heads, d], k and v
    [t, G, d] in sequence order, with q and k normalized and rotated. None: the layer calls modules
    for the steps, which also work where ranks exchange rows between the norm and the rotation."""


def rotated_heads(
    projections: Sequence[torch.Tensor],
    heads: ProjectedHeads,
    norms: HeadNorms | None,
    grouping: Grouping,
    rotary: RotaryAngles,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute ``LayerOperations.rotated_heads`` in plain PyTorch, as a function without modules."""
    split = [heads.split(rows) for rows in projections]
    queries, keys, values = (list(parts) for parts in zip(*split, strict=True))
    if norms is not None:
        shape, eps = (heads.head_dim,), norms.eps
        queries = [
            F.rms_norm(part, shape, weight, eps)
            for part, weight in zip(queries, norms.query_weights, strict=True)
        ]
        keys = [
            F.rms_norm(part, shape, weight, eps)
            for part, weight in zip(keys, norms.key_weights, strict=True)
        ]
    q, k, v = (
        _in_sequence_order([part.flatten(1, 2) for part in slices], grouping.indices)
        for slices in (queries, keys, values)
    )
    return rotary.rotate(q), rotary.rotate(k), v


def _in_sequence_order(
    slices: Sequence[torch.Tensor], indices: Sequence[torch.Tensor]
) -> torch.Tensor:
    tokens = sum(index.numel() for index in indices)
    rows = slices[0].new_zeros(tokens, *slices[0].shape[1:])
    for index, part in zip(indices, slices, strict=True):
        rows = rows.index_copy(0, index, part[: index.numel()])
    return rows


def _swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _norm_then_add(
    update: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    return residual + F.rms_norm(update, weight.shape, weight, eps)


def _add_then_norm(
    update: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    total = residual + update
    return total, F.rms_norm(total, weight.shape, weight, eps)


PLAIN = LayerOperations(
    _swiglu, _norm_then_add, _add_then_norm, Grouping.to_towers, rotated_heads=None
)
"""Plain PyTorch: the reference for every other implementation."""


Backend = Literal["auto", "torch", "triton", "compile"]


def check_backend(backend: Backend, on_gpus: bool) -> None:
    """Check that ``model.layer_backend`` runs on the devices of this job.

    Raises:
        ConfigError: It is "triton", and Triton is absent, or there is no GPU.
    """
    if backend == "triton" and not _triton_runs(on_gpus):
        raise ConfigError(
            'model.layer_backend = "triton" needs a GPU and the package triton; allowed here:'
            ' "auto", "torch" or "compile"'
        )


def layer_operations(backend: Backend, on_gpus: bool) -> LayerOperations:
    """Return the implementation that ``model.layer_backend`` selects on the devices of this job.

    Raises:
        ConfigError: As ``check_backend``.
    """
    check_backend(backend, on_gpus)
    if backend == "auto":
        backend = "triton" if on_gpus and _triton_runs(on_gpus) else "torch"
    if backend == "triton":
        return triton_operations()
    return compiled_operations() if backend == "compile" else PLAIN


def _triton_runs(on_gpus: bool) -> bool:
    if find_spec("triton") is None:
        return False
    if on_gpus:
        return True
    from triton import knobs

    return knobs.runtime.interpret  # as in tests


def triton_operations() -> LayerOperations:
    """Return the fused kernels."""
    # Triton is absent from torch's builds without CUDA.
    from mot_megatron.model.fused.gather import gathered
    from mot_megatron.model.fused.qkv import rotated_heads
    from mot_megatron.model.fused.residual_norm import add_then_norm, norm_then_add
    from mot_megatron.model.fused.swiglu import swiglu

    return LayerOperations(swiglu, norm_then_add, add_then_norm, gathered, rotated_heads)


def compiled_operations() -> LayerOperations:
    """Return plain PyTorch, fused by torch.compile at the first call with new sizes."""
    return LayerOperations(
        torch.compile(_swiglu),
        torch.compile(_norm_then_add),
        torch.compile(_add_then_norm),
        Grouping.to_towers,  # copies by index, which leave nothing to fuse
        torch.compile(rotated_heads),
    )
