"""The adaptation of megatron-core to machines without CUDA; nothing else patches or calls it.

Three things of megatron's are not for the CPU: buffers on ``torch.cuda.current_device()``, a
counter on the device "cuda" in its pipeline schedules, and messages between stages that rely on
NCCL's order.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import p2p_communication, schedules

_ACTIVATION, _GRADIENT = 0, 1


def adapt_megatron_to_cpu() -> None:
    """Let megatron-core work on host memory and gloo; idempotent.

    Where CUDA is available but unused, megatron would still allocate on the GPU: a run on CPU
    tensors then needs the GPU hidden (``CUDA_VISIBLE_DEVICES=""``).
    """
    if not torch.cuda.is_available():
        torch.cuda.current_device = _host_device  # type: ignore[assignment]
        schedules.torch = _HostTorch("torch")  # type: ignore[attr-defined]
        p2p_communication._p2p_ops = _tagged_messages


def _host_device() -> str:
    return "cpu"


class _HostTorch(ModuleType):
    """``torch`` as megatron's schedules see it, where the device "cuda" is the host."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*size: Any, device: Any = None, **options: Any) -> torch.Tensor:
        return torch.zeros(*size, device="cpu" if device == "cuda" else device, **options)


def _tagged_messages(
    *,
    tensor_send_prev: torch.Tensor | None,
    tensor_recv_prev: torch.Tensor | None,
    tensor_send_next: torch.Tensor | None,
    tensor_recv_next: torch.Tensor | None,
    group: dist.ProcessGroup,
    prev_pipeline_rank: int,
    next_pipeline_rank: int,
) -> dict[str, dist.Work]:
    """Megatron's messages between neighbouring stages, activations told from gradients by tag.

    With two stages previous and next are the same rank, and gloo matches untagged messages by
    order alone: interleaved schedules then take one for the other, and train on it.
    """
    messages = (
        ("send_prev", dist.isend, tensor_send_prev, prev_pipeline_rank, _GRADIENT),
        ("recv_prev", dist.irecv, tensor_recv_prev, prev_pipeline_rank, _ACTIVATION),
        ("send_next", dist.isend, tensor_send_next, next_pipeline_rank, _ACTIVATION),
        ("recv_next", dist.irecv, tensor_recv_next, next_pipeline_rank, _GRADIENT),
    )
    requests = {}
    for name, operation, tensor, peer, tag in messages:
        if tensor is not None:
            request = operation(tensor, peer, group=group, tag=tag)
            assert request is not None
            requests[name] = request
    return requests
