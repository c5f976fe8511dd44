"""AdamW whose gradients are scaled, or whose step is withheld, at the last moment.

DeepSpeed hands every ZeRO stage's gradients to the wrapped optimizer just before its step, in fp32
and in the layout the stage updates. Clipping there works the same for all stages, needs nothing of
DeepSpeed's internals, and lets a step with non-finite gradients run through DeepSpeed's own
clean-up without changing a weight.
"""

from __future__ import annotations

from typing import Any

import torch


class GatedAdamW(torch.optim.AdamW):
    """torch's AdamW with a gate that is set anew before every step."""

    gradient_scale: float = 1.0
    """Multiplies every gradient of the next step (the clipping coefficient)."""
    open: bool = True
    """False withholds the next step: weights and state stay as they are."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # the base class types closure as overloads
        """Scale the gradients in place, then step; or do nothing while the gate is shut."""
        if not self.open:
            return None
        if self.gradient_scale != 1.0:
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.mul_(self.gradient_scale)
        return super().step(closure)

    def make_state(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """Create the state that the first step would create, so that it can be read and set."""
        # The fused kernel keeps its counter beside the parameter.
        self.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
        return self.state[parameter]
