"""The adaptation of megatron-core to machines without CUDA; nothing else patches or calls it.

megatron-core allocates its communication buffers on ``torch.cuda.current_device()``. On a CPU that
call raises, so it is made to name the CPU; the paths that we use need no more than this.
"""

from __future__ import annotations

import torch


def adapt_megatron_to_cpu() -> None:
    """Let megatron-core's sequence-parallel buffers live in host memory; idempotent.

    Where CUDA is available but unused, megatron would still allocate on the GPU: a run on CPU
    tensors then needs the GPU hidden (``CUDA_VISIBLE_DEVICES=""``).
    """
    if not torch.cuda.is_available():
        torch.cuda.current_device = _host_device  # type: ignore[assignment]


def _host_device() -> str:
    return "cpu"
