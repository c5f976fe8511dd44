"""What the optimizer is asked to do, as plain values: ``train`` fills it from the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW under ZeRO. The learning rate is given anew to every step."""

    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip_grad: float
    """Largest L2 norm of the whole gradient; 0 leaves gradients as they are."""
    zero_stage: Literal[0, 1, 2, 3]
    """What data-parallel ranks share out: 0 nothing, 1 optimizer state, 2 also gradients, 3 also
    weights."""
    offload: Literal["none", "optimizer"]
    """Where the fp32 weights and the AdamW state live: the device, or the host's memory."""
    precision: Literal["fp32", "bf16"]
    """Of the weights that forward and backward see; the optimizer's copy is always fp32."""
    gradient_accumulation_steps: int
    """Micro-batches per optimizer step on each data-parallel rank."""
    micro_batch_size: int
    """Sequences per micro-batch on each data-parallel rank."""
