"""Setup of DeepSpeed: its configuration, our process groups, no log output, no compilation."""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Any

import deepspeed
import deepspeed.ops
import torch.distributed as dist

from mot_megatron.optim.owners import has_owned_towers
from mot_megatron.optim.settings import LARGEST_BUCKET, OptimizerSettings

if TYPE_CHECKING:
    from torch import nn

    from mot_megatron.parallel.groups import ProcessGroups

NEVER = 2**62
"""Optimizer steps between DeepSpeed's own progress lines: effectively none are printed."""


class Topology:
    """The ``mpu`` argument of DeepSpeed, which gives it our process groups explicitly."""

    def __init__(self, groups: ProcessGroups):
        self._groups = groups

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """Return the ranks that together hold one copy of the model (tensor and pipeline)."""
        return self._groups.model

    def get_model_parallel_rank(self) -> int:
        """Return this rank's position in the model-parallel group; the tensor rank is fastest."""
        return self._groups.tensor_rank + self._groups.tensor_size * self._groups.pipeline_rank

    def get_model_parallel_world_size(self) -> int:
        """Return the size of the model-parallel group."""
        return self._groups.tensor_size * self._groups.pipeline_size

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        """Return the ranks over which every matrix is split."""
        return self._groups.tensor

    def get_tensor_model_parallel_rank(self) -> int:
        """Return this rank's position in the tensor-parallel group."""
        return self._groups.tensor_rank

    def get_tensor_model_parallel_world_size(self) -> int:
        """Return the size of the tensor-parallel group."""
        return self._groups.tensor_size

    def get_pipeline_model_parallel_group(self) -> dist.ProcessGroup:
        """Return the stages of this rank's pipeline."""
        return self._groups.pipeline

    def get_pipeline_model_parallel_rank(self) -> int:
        """Return this rank's pipeline stage."""
        return self._groups.pipeline_rank

    def get_pipeline_model_parallel_world_size(self) -> int:
        """Return the number of pipeline stages."""
        return self._groups.pipeline_size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """Return the ranks with the same pipeline stage and tensor-parallel rank."""
        return self._groups.data

    def get_data_parallel_rank(self) -> int:
        """Return this rank's position in the data-parallel group."""
        return self._groups.data_rank

    def get_data_parallel_world_size(self) -> int:
        """Return the size of the data-parallel group."""
        return self._groups.data_size

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Return the global ranks of the data-parallel group."""
        return dist.get_process_group_ranks(self._groups.data)


def prepare_deepspeed() -> None:
    """Silence DeepSpeed and attach it to the existing process group.

    This also disables DeepSpeed's shared-memory collective for CPUs, which would be compiled at
    first use. That takes minutes, and a killed build leaves a lock on which later starts wait
    forever.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed calls collectives by names that torch 2.13 deprecates.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # type: ignore[attr-defined]
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def sums_gradients(settings: OptimizerSettings) -> bool:
    """Return whether DeepSpeed sums gradients over ranks; ZeRO-3 can only average them."""
    return settings.zero_stage < 3


def deepspeed_config(
    settings: OptimizerSettings, model: nn.Module, groups: ProcessGroups
) -> dict[str, Any]:
    """Return the DeepSpeed configuration for ``settings``; DeepSpeed ignores unknown keys."""
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    vectors = [p.numel() for p in model.parameters() if p.ndim <= 1]
    # A bucket smaller than the largest parameter crashes ZeRO-2 on uneven sizes; one larger than
    # the model wastes memory.
    bucket = max(max(sizes), min(sum(sizes), LARGEST_BUCKET))
    if has_owned_towers(groups):
        # Reduce every parameter separately: a bucket mixes parameters with different owners, and
        # ranks that hold different towers would fill their buckets at different points.
        bucket = 1
    zero: dict[str, Any] = {
        "stage": settings.zero_stage,
        # Gathers of ZeRO-3 on a stream of their own; this project reduces the other stages'
        # gradients itself, or has DeepSpeed do so after backward.
        "overlap_comm": settings.zero_stage == 3 and groups.device.type == "cuda",
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": LARGEST_BUCKET,
        # ZeRO-3 keeps all vectors whole, since gathering them costs more than sharding saves, but
        # no matrix.
        "stage3_param_persistence_threshold": max(vectors, default=0) + 1,
    }
    if settings.offload == "optimizer":
        zero["offload_optimizer"] = {
            "device": "cpu",
            "pin_memory": groups.device.type == "cuda",
        }
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "gradient_clipping": 0.0,  # ZeroEngine clips instead, through GatedAdamW
        "gradient_allreduce_op": "sum" if sums_gradients(settings) else "mean",
        "steps_per_print": NEVER,
        # It would wait for the GPU in every forward pass.
        "timers": {"throughput": {"enabled": False}},
        "zero_optimization": zero,
        # GatedAdamW is not one of the optimizer types that DeepSpeed accepts, and it also runs on
        # the CPU.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if settings.precision == "bf16":
        # ZeroEngine detects NaN itself. When DeepSpeed does, it fails to clear the offloaded
        # gradients of bf16 weights, which then remain NaN.
        config["bf16"] = {
            "enabled": True,
            "immediate_grad_update": True,
            "check_grad_overflow": False,
        }
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["communication_data_type"] = "fp32"
    return config
