"""Dense GPTModels of megatron-core, saved and loaded by its dist_checkpointing on one rank."""

from __future__ import annotations

import contextlib
import json
import queue
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def build(arguments: dict[str, dict[str, Any]], tensor_parallel_size: int = 1) -> Any:
    """Build a GPTModel from what gpt_model.json contains; call it on a rank."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_parallel_size)
    settings = dict(arguments["TransformerConfig"])
    activation = getattr(torch.nn.functional, settings.pop("activation_func"))
    config = TransformerConfig(
        **settings,
        tensor_model_parallel_size=tensor_parallel_size,
        activation_func=activation,
        use_cpu_initialization=True,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
    )
    spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    return GPTModel(config, spec, **arguments["GPTModel"]).eval()


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return logits [b, s, V] of documents [b, s]."""
    length = ids.shape[1]
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    positions = torch.arange(length).expand_as(ids)
    return model(ids, positions, mask)


class _NoTracker:
    def fork(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def _on_cpu() -> None:
    """Let dist_checkpointing run without CUDA and in a forked rank."""
    from megatron.core import tensor_parallel
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from mot_megatron.parallel.cpu import adapt_megatron_to_cpu

    adapt_megatron_to_cpu()
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    # Without dropout, no random numbers are drawn from the state that it would swap in on a GPU.
    tensor_parallel.get_cuda_rng_tracker = _NoTracker  # type: ignore[assignment]
    # Otherwise it starts a server process, for 8 s.
    filesystem_async._results_queue = queue.Queue()


def save_on_rank(
    arguments: dict[str, dict[str, Any]], folders: dict[str, dict[str, Any]], ids: torch.Tensor
) -> torch.Tensor:
    """Save a random model to each folder, with its metadata; return the logits."""
    from megatron.core import dist_checkpointing

    _on_cpu()
    torch.manual_seed(5)
    model = build(arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.3)
    for folder, metadata in folders.items():
        state = model.sharded_state_dict(metadata=dict(metadata) or None)
        Path(folder).mkdir(parents=True)
        dist_checkpointing.save(state, folder)
    return logits(model, ids)


def load_on_rank(folder: str, ids: torch.Tensor) -> torch.Tensor:
    """Load a checkpoint into the model that its gpt_model.json tells; return the logits."""
    from megatron.core import dist_checkpointing

    _on_cpu()
    model = build(json.loads(Path(folder, "gpt_model.json").read_text()))
    state = dist_checkpointing.load(model.sharded_state_dict(), folder, strict="raise_all")
    model.load_state_dict(state)
    return logits(model, ids)


def save_again_on_ranks(folder: str, other: str) -> None:
    """Load a checkpoint into a model that is split over all ranks, and save it to a new folder."""
    from megatron.core import dist_checkpointing

    _on_cpu()
    arguments = json.loads(Path(folder, "gpt_model.json").read_text())
    model = build(arguments, tensor_parallel_size=dist.get_world_size())
    model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), folder))
    Path(other).mkdir(exist_ok=True)
    dist_checkpointing.save(model.sharded_state_dict(), other)
