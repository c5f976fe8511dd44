"""Detects steps whose loss or gradient norm is far above those of recent steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

DEVIATIONS = 6.0
"""A value this many standard deviations above the mean of the recent steps is a spike."""
RECENT_STEPS = 128
"""Steps that a value is compared with."""
LEAST_STEPS = 32
"""Nothing is a spike before this many steps are known."""
_LEAST_DEVIATION = 1e-3
"""Smallest standard deviation, as a fraction of the mean: rounding is no spike."""


class SpikeGuard:
    """Compares the loss and the gradient norm of every step with those of the recent ones.

    Both come from all-reduces over the world, so all ranks decide equally without a message.
    """

    def __init__(self, recent: list[list[float]]) -> None:
        """Continue with ``recent``, the [loss, gradient norm] of recent steps, kept up to date."""
        self._recent = recent

    def judge(self, loss: float, norm: float) -> str | None:
        """Return what is wrong with a step, in words; None if nothing is.

        A loss that is NaN, because no label has a weight, is not judged.
        """
        if len(self._recent) < LEAST_STEPS:
            return None
        losses, norms = zip(*self._recent, strict=True)
        return _judge("loss", loss, losses) or _judge("gradient norm", norm, norms)

    def add(self, loss: float, norm: float) -> None:
        """Add a step whose update was made."""
        if math.isfinite(loss) and math.isfinite(norm):
            self._recent.append([loss, norm])
            del self._recent[:-RECENT_STEPS]


def _judge(name: str, value: float, recent: Sequence[float]) -> str | None:
    mean = math.fsum(recent) / len(recent)
    variance = math.fsum((each - mean) ** 2 for each in recent) / len(recent)
    deviation = max(math.sqrt(variance), _LEAST_DEVIATION * abs(mean))
    if not value > mean + DEVIATIONS * deviation:
        return None
    return (
        f"the {name} {value:.4g} is {(value - mean) / deviation:.1f} standard deviations above"
        f" {mean:.4g}, the mean of the last {len(recent)} steps"
    )
