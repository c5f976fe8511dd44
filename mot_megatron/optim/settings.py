"""What the optimizer is asked to do, as plain values: ``train`` fills it from the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mot_megatron.errors import ConfigError

ZERO_STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW under ZeRO. The learning rate is given anew to every step."""

    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip_grad: float
    """Largest L2 norm of the whole gradient; 0 leaves gradients as they are."""
    zero_stage: int
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

    def __post_init__(self) -> None:
        if self.zero_stage not in ZERO_STAGES:
            raise ConfigError(
                f"zero_stage = {self.zero_stage} is not a ZeRO stage; allowed: {ZERO_STAGES}"
            )
        if self.zero_stage == 0 and self.offload != "none":
            raise ConfigError(
                'zero_stage = 0 keeps the optimizer on the device: offload = "optimizer" needs '
                "zero_stage 1, 2 or 3"
            )
        if self.zero_stage == 0 and self.precision == "bf16":
            raise ConfigError(
                'zero_stage = 0 with precision = "bf16" would sum gradients in bf16; '
                "use zero_stage 1, 2 or 3 (with one data-parallel rank they cost nothing more)"
            )
