"""Learning rate as a pure function of the step: linear warm-up, then decay to a minimum."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

ScheduleStyle = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True)
class LearningRateSchedule:
    """Linear warm-up to ``peak``, then decay to ``minimum``, then constant."""

    peak: float
    """Learning rate at the end of the warm-up."""
    minimum: float
    """Learning rate at the end of the decay; unused by the constant style."""
    warmup_steps: int
    """Optimizer steps of the warm-up from zero to ``peak``; 0: start at ``peak``."""
    decay_steps: int
    """Optimizer steps of the decay, counted from the end of the warm-up."""
    style: ScheduleStyle
    """Shape of the decay; "constant" stays at ``peak``."""

    def at(self, step: int) -> float:
        """Return the learning rate of the optimizer step with index ``step``, counted from 0.

        The first step of a warm-up uses ``peak / warmup_steps``, since a learning rate of zero
        would waste its batch.
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
