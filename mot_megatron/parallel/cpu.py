"""Patches that let megatron-core run on the CPU with gloo; nothing else patches megatron-core.

megatron-core assumes CUDA in five places:

- Buffers are allocated on ``torch.cuda.current_device()``.
- The pipeline schedules create a counter on the device "cuda".
- Point-to-point messages between stages rely on NCCL's ordering.
- The MoE token dispatcher copies sizes to the host on a side stream.
- Gathers and reduce-scatters along the first dimension may have unequal parts, which gloo does not
  support.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import p2p_communication, schedules
from megatron.core.tensor_parallel import mappings
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

_ACTIVATION, _GRADIENT = 0, 1
_gather_equal_parts = mappings._gather_along_first_dim
_reduce_scatter_equal_parts = mappings._reduce_scatter_along_first_dim
_NO_STREAM = object()
"""Placeholder for the dispatcher's side stream, so that it does not create a CUDA stream."""


def adapt_megatron_to_cpu() -> None:
    """Patch megatron-core to run on host memory and gloo; idempotent.

    This does nothing if CUDA is available, since megatron-core then allocates on the GPU. To run on
    the CPU of a machine with a GPU, hide the GPU with ``CUDA_VISIBLE_DEVICES=""``.
    """
    if not torch.cuda.is_available():
        torch.cuda.current_device = _host_device  # type: ignore[assignment]
        schedules.torch = _HostTorch("torch")  # type: ignore[attr-defined]
        p2p_communication._p2p_ops = _tagged_messages
        mappings._gather_along_first_dim = _gather
        mappings._reduce_scatter_along_first_dim = _reduce_scatter
        MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = _NO_STREAM  # type: ignore[assignment]
        MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize = _sizes_on_host  # type: ignore[assignment]


def _host_device() -> str:
    return "cpu"


class _HostTorch(ModuleType):
    """A proxy for ``torch`` in megatron's schedules, where the device "cuda" means the CPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*size: Any, device: Any = None, **options: Any) -> torch.Tensor:
        return torch.zeros(*size, device="cpu" if device == "cuda" else device, **options)


def _gather(
    part: torch.Tensor,
    group: dist.ProcessGroup,
    output_split_sizes: list[int] | None = None,
    use_global_buffer: bool = False,
) -> torch.Tensor:
    """Gather the parts of all ranks along the first dimension; sizes may differ."""
    if output_split_sizes is None or group.size() == 1:
        return _gather_equal_parts(part, group, output_split_sizes, use_global_buffer)
    gathered = part.new_empty(sum(output_split_sizes), *part.shape[1:])
    copies = torch.cat([part] * group.size())
    sizes = [len(part)] * group.size()
    dist.all_to_all_single(gathered, copies, output_split_sizes, sizes, group=group)
    return gathered


def _reduce_scatter(
    whole: torch.Tensor,
    group: dist.ProcessGroup,
    input_split_sizes: list[int] | None = None,
    use_global_buffer: bool = False,
) -> torch.Tensor:
    """Return this rank's part of the sum over all ranks; sizes may differ."""
    if input_split_sizes is None or group.size() == 1:
        return _reduce_scatter_equal_parts(whole, group, input_split_sizes, use_global_buffer)
    own = input_split_sizes[group.rank()]
    parts = whole.new_empty(group.size(), own, *whole.shape[1:])
    sizes = [own] * group.size()
    dist.all_to_all_single(
        parts.flatten(0, 1), whole.contiguous(), sizes, input_split_sizes, group=group
    )
    return parts.sum(0)


def _sizes_on_host(
    dispatcher: MoEAlltoAllTokenDispatcher,
    point: str,
    tokens_per_expert: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Convert sizes to arrays, as the copy to the host would; there is nothing to wait for."""
    if point == dispatcher.cuda_dtoh_point:
        for name in ("input_splits", "output_splits", "output_splits_tp"):
            sizes = getattr(dispatcher, name)
            if sizes is not None:
                setattr(dispatcher, name, sizes.numpy())
    return tokens_per_expert


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
    """Send and receive between neighboring stages, with a tag per kind of message.

    With two stages, the previous and the next stage are the same rank, and gloo matches untagged
    messages by order alone. Interleaved schedules would then silently swap activations and
    gradients.
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
