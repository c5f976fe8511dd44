"""Settings of the optimizer as plain values, which ``train`` fills from the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mot_megatron.parallel.buckets import largest_bucket

LARGEST_BUCKET = 200_000_000
"""Maximum number of elements in one collective, unless a single parameter is larger.

It must be even, because DeepSpeed's all-gathers require it.
"""


@dataclass(frozen=True)
class OptimizerSettings:
    """Settings of AdamW under ZeRO. The learning rate is an argument of every step instead."""

    betas: tuple[float, float]
    """Decay rates of the first and second moment."""
    eps: float
    """Added to the square root of the second moment in the denominator of the update."""
    weight_decay: float
    """Decoupled weight decay of matrices."""
    clip_grad: float
    """Maximum L2 norm of the whole gradient; 0: no clipping."""
    zero_stage: Literal[0, 1, 2, 3]
    """What is sharded over data-parallel ranks. 0: nothing; 1: optimizer state; 2: also gradients;
    3: also weights."""
    offload: Literal["none", "optimizer"]
    """Where fp32 weights and AdamW state are stored. none: on the device; optimizer: in host
    memory."""
    precision: Literal["fp32", "bf16"]
    """Precision of the weights in forward and backward; the optimizer's copy is always fp32."""
    gradient_accumulation_steps: int
    """Micro-batches per optimizer step on each data-parallel rank."""
    micro_batch_size: int
    """Sequences per micro-batch on each data-parallel rank."""
    lr_mults: tuple[float, ...] = ()
    """Factor on the learning rate of each of the K towers' own weights; empty: 1 for all."""

    @property
    def elements_reduced_together(self) -> int | None:
        """Maximum number of elements in a parameter group; None: no maximum.

        In the other cases, DeepSpeed has buckets that are not parameter groups.
        """
        return largest_bucket(self.zero_stage, self.precision, self.offload)
