"""AdamW that can scale gradients or skip the update inside ``step``.

In every ZeRO stage, DeepSpeed passes gradients to the wrapped optimizer just before its step, in
fp32 and sharded as the stage updates them. Clipping at this point works the same for all stages and
without access to DeepSpeed's internals. A step with non-finite gradients still runs DeepSpeed's own
clean-up but changes no weight.
"""

from __future__ import annotations

from typing import Any

import torch


class GatedAdamW(torch.optim.AdamW):
    """AdamW of torch with a gate; set both attributes before every step."""

    gradient_scale: float = 1.0
    """Factor on every gradient in the next step: the clipping coefficient."""
    open: bool = True
    """Whether the next step updates; False leaves weights and state unchanged."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # the base class types closure as overloads
        """Scale the gradients in place and step; do nothing if the gate is closed."""
        if not self.open:
            return None
        if self.gradient_scale != 1.0:
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.mul_(self.gradient_scale)
        return super().step(closure)

    def make_state(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """Create the state that the first step would create, so that it can be read or loaded."""
        # The fused kernel requires the step counter on the device of the parameter.
        self.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
        return self.state[parameter]
