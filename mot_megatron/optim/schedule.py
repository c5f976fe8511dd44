"""The learning rate as a pure function of the step: linear warm-up, then a decay to a floor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

ScheduleStyle = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True)
class LearningRateSchedule:
    """Warm-up to ``peak``, then decay to ``minimum``, which holds from then on."""

    peak: float
    """Learning rate at the end of the warm-up."""
    minimum: float
    """Learning rate at the end of the decay; unused by the constant style."""
    warmup_steps: int
    """Optimizer steps from zero up to ``peak``; 0 starts at ``peak``."""
    decay_steps: int
    """Optimizer steps from the end of the warm-up until ``minimum``."""
    style: ScheduleStyle
    """Shape of the decay; "constant" stays at ``peak``."""

    def at(self, step: int) -> float:
        """Learning rate of the optimizer step with index ``step``, counted from 0.

        The first step of a warm-up takes ``peak / warmup_steps``, since a step of size zero would
        waste its batch.
        """
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.style == "constant":
            return self.peak
        elapsed = step - self.warmup_steps
        progress = min(1.0, elapsed / self.decay_steps) if self.decay_steps > 0 else 1.0
        if self.style == "cosine":
            remaining = 0.5 * (1.0 + math.cos(math.pi * progress))
        else:
            remaining = 1.0 - progress
        return self.minimum + (self.peak - self.minimum) * remaining
