"""What a person reads while a run goes on: lines of at most 120 columns, and a progress bar."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import TracebackType

from tqdm import tqdm

from mot_megatron.train.interval import Interval
from mot_megatron.train.step import HeldOut

WIDTH = 120


class Console:
    """Prints on the first rank; elsewhere every call does nothing."""

    def __init__(
        self, modalities: Sequence[str], start_step: int, last_step: int, on: bool
    ) -> None:
        self.modalities = tuple(modalities)
        self.last_step = last_step
        self.on = on
        # disable=None: no bar where nobody watches, as in a log file; the lines say it all.
        self.bar = tqdm(
            total=last_step, initial=start_step, ncols=WIDTH, unit="step", desc="training",
            disable=None if on else True, leave=False,
        )  # fmt: skip

    def __enter__(self) -> Console:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.close()

    def say(self, line: str) -> None:
        """Print a line without breaking the bar."""
        if self.on:
            self.bar.write(line)

    def advance(self) -> None:
        """Count one step on the bar."""
        self.bar.update()

    def interval(self, step: int, interval: Interval, mfu: float, seconds_left: float) -> None:
        """The line of one log interval; ``step`` counts steps done."""
        parts = (
            f"step {step:>{len(str(self.last_step))}}/{self.last_step}",
            f"{self._bits(interval.modality_bits)} bits",
            f"norm {interval.norms.total:.2f}",
            f"lr {interval.learning_rate:.1e}",
            f"{_thousands(interval.tokens_per_second)} tok/s",
            f"mfu {100 * mfu:.0f}%",
            f"left {duration(seconds_left)}",
        )
        line = " | ".join(parts)
        # Long runs of many modalities need the room of the spaces.
        self.say(line if len(line) <= WIDTH else "|".join(parts).replace("  ", " "))
        if interval.imbalance > 1:
            self.say(
                f"  modality groups: the busiest rank has {interval.imbalance:.2f} of the mean"
                f" FLOPs, which costs about {interval.imbalance_percent:.0f}% of the step"
            )

    def held_out(self, step: int, held_out: HeldOut, sees_the_future: bool) -> None:
        """The line of an evaluation, with a second one where the first is not honest.

        Args:
            step: Steps done.
            held_out: What was reached.
            sees_the_future: Whether the routing of training looks at later tokens.
        """
        beginning = f"held out, step {step:>{len(str(self.last_step))}}: "
        line = f"{beginning}{self._bits(held_out.as_trained)} bits per token"
        self.say(f"{line}, routed with later tokens" if sees_the_future else line)
        if held_out.causal is not None:
            label = "routed causally: ".rjust(len(beginning))
            bits = self._bits(held_out.causal)
            self.say(f"{label}{bits} bits per token, honest: as generation routes")

    def _bits(self, modality_bits: Sequence[float]) -> str:
        return "  ".join(
            f"{name} {'-' if math.isnan(bits) else f'{bits:.3f}'}"
            for name, bits in zip(self.modalities, modality_bits, strict=True)
        )


def duration(seconds: float) -> str:
    """Hours, minutes and seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _thousands(value: float) -> str:
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.1f}{suffix}"
    return f"{value:.0f}"
