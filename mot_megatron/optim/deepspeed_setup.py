"""How DeepSpeed is set up: quiet, without compiling anything, and told of our process groups."""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Any

import deepspeed
import deepspeed.ops
import torch.distributed as dist

from mot_megatron.optim.owners import has_owned_towers
from mot_megatron.optim.settings import OptimizerSettings

if TYPE_CHECKING:
    from torch import nn

    from mot_megatron.parallel.groups import ProcessGroups

NEVER = 2**62
"""Steps between DeepSpeed's own progress lines."""
LARGEST_BUCKET = 200_000_000
"""Elements in one collective, unless a single parameter is larger; even, for all-gathers."""


class Topology:
    """What DeepSpeed calls an mpu: it is asked for groups, and knows no globals of megatron."""

    def __init__(self, groups: ProcessGroups):
        self._groups = groups

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """Ranks that together hold one copy of the model: tensor and pipeline parallelism."""
        return self._groups.model

    def get_model_parallel_rank(self) -> int:
        """This rank's place among them, tensor parallelism fastest."""
        return self._groups.tensor_rank + self._groups.tensor_size * self._groups.pipeline_rank

    def get_model_parallel_world_size(self) -> int:
        """How many they are."""
        return self._groups.tensor_size * self._groups.pipeline_size

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        """Ranks that share every matrix."""
        return self._groups.tensor

    def get_tensor_model_parallel_rank(self) -> int:
        """This rank's place among them."""
        return self._groups.tensor_rank

    def get_tensor_model_parallel_world_size(self) -> int:
        """How many they are."""
        return self._groups.tensor_size

    def get_pipeline_model_parallel_group(self) -> dist.ProcessGroup:
        """The stages of a pipeline."""
        return self._groups.pipeline

    def get_pipeline_model_parallel_rank(self) -> int:
        """This rank's stage."""
        return self._groups.pipeline_rank

    def get_pipeline_model_parallel_world_size(self) -> int:
        """How many stages there are."""
        return self._groups.pipeline_size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """Ranks that hold the same shard of the model and see different data."""
        return self._groups.data

    def get_data_parallel_rank(self) -> int:
        """This rank's place among them."""
        return self._groups.data_rank

    def get_data_parallel_world_size(self) -> int:
        """How many they are."""
        return self._groups.data_size

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Their ranks in the world."""
        return dist.get_process_group_ranks(self._groups.data)


def prepare_deepspeed() -> None:
    """Quieten DeepSpeed and attach it to the process group that exists already.

    Its shared-memory collective for CPUs would be compiled at first use (minutes, and a killed
    build leaves a lock that later starts wait on for ever), so that is switched off.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # It calls collectives by names that torch 2.13 has given new ones.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # type: ignore[attr-defined]
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def sums_gradients(settings: OptimizerSettings) -> bool:
    """Whether DeepSpeed can sum gradients over ranks; ZeRO-3 can only average them."""
    return settings.zero_stage < 3


def deepspeed_config(
    settings: OptimizerSettings, model: nn.Module, groups: ProcessGroups
) -> dict[str, Any]:
    """The DeepSpeed configuration for ``settings``; DeepSpeed ignores keys it does not know."""
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    vectors = [p.numel() for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    # Buckets smaller than the largest parameter crash ZeRO-2 on uneven sizes; larger than the
    # model they are wasted memory.
    bucket = max(max(sizes), min(sum(sizes), LARGEST_BUCKET))
    if has_owned_towers(groups):
        # A bucket mixes parameters of several owners, and ranks that hold different towers would
        # fill theirs at different points. So each parameter is reduced by itself.
        bucket = 1
    zero: dict[str, Any] = {
        "stage": settings.zero_stage,
        "overlap_comm": False,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": LARGEST_BUCKET,
        # ZeRO-3 keeps vectors whole (gathering them costs more than it saves), matrices never.
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
        "gradient_clipping": 0.0,  # the engine clips, see GatedAdamW
        "gradient_allreduce_op": "sum" if sums_gradients(settings) else "mean",
        "steps_per_print": NEVER,
        "zero_optimization": zero,
        # GatedAdamW is not in DeepSpeed's list of exact types, and it runs on the CPU as well.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if settings.precision == "bf16":
        # A NaN is ours to notice: where DeepSpeed does, it forgets to clear the offloaded
        # gradients of bf16 weights, which then stay NaN.
        config["bf16"] = {
            "enabled": True,
            "immediate_grad_update": True,
            "check_grad_overflow": False,
        }
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["communication_data_type"] = "fp32"
    return config
