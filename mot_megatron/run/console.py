"""Console output of a run: lines of at most 120 columns, and a progress bar on a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import TracebackType

from tqdm import tqdm

from mot_megatron.config_model import LossUnit, common_unit
from mot_megatron.data.blend_stream import SourceProgress
from mot_megatron.train.interval import Interval
from mot_megatron.train.step import HeldOut

WIDTH = 120
_GROWTH = 1.02
"""Peak memory is printed when it has grown by this factor."""


class Console:
    """Prints on the first rank; on other ranks, every call does nothing."""

    def __init__(
        self, loss_units: Mapping[str, LossUnit], start_step: int, last_step: int, on: bool
    ) -> None:
        self.loss_units = dict(loss_units)
        self.last_step = last_step
        self.on = on
        self._memory_bytes = 0
        # disable=None: show the bar only on a terminal, not in a log file.
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
        """Print a line above the progress bar."""
        if self.on:
            self.bar.write(line)

    def say_here(self, line: str) -> None:
        """Print a line above the progress bar, whichever rank this is."""
        self.bar.write(line)

    def advance(self) -> None:
        """Advance the progress bar by one step."""
        self.bar.update()

    def go_back(self, steps: int) -> None:
        """Set the progress bar to a number of steps done."""
        self.bar.n = steps
        self.bar.refresh()

    def interval(
        self,
        step: int,
        interval: Interval,
        mfu: float,
        seconds_left: float,
        memory_bytes: int,
    ) -> None:
        """Print the line of one log interval.

        Args:
            step: Steps done.
            interval: Statistics of the steps since the last line.
            mfu: Model FLOPs utilization, 0 to 1.
            seconds_left: Expected remaining time.
            memory_bytes: Peak memory of the rank that used most.
        """
        parts = (
            f"step {step:>{len(str(self.last_step))}}/{self.last_step}",
            self._losses(interval.modality_losses),
            f"grad norm {interval.norms.total:.2f}",
            f"lr {interval.learning_rate:.1e}",
            f"{1000 * interval.seconds.total:.0f} ms",
            f"{_thousands(interval.tokens_per_second)} tok/s",
            f"mfu {100 * mfu:.0f}%",
            f"left {duration(seconds_left)}",
        )
        # TensorBoard has the seconds per step too.
        shortest = "|".join((*parts[:4], *parts[5:])).replace("grad norm", "norm")
        lines = (separator.join(parts) for separator in (" | ", "  ", "|"))
        self.say(next((line for line in lines if len(line) <= WIDTH), shortest))
        if memory_bytes > _GROWTH * self._memory_bytes:
            self._memory_bytes = memory_bytes
            self.say(f"  peak memory of the fullest rank: {memory_bytes / 2**30:.2f} GiB")
        if interval.imbalance > 1:
            self.say(
                f"  modality groups: the busiest rank has {interval.imbalance:.2f} times the mean"
                f" FLOPs, which costs about {interval.imbalance_percent:.0f}% of the step"
            )

    def sources(self, sources: Sequence[SourceProgress]) -> None:
        """Print what was read of each source of a blend."""
        if not sources:
            return
        total = sum(source.tokens for source in sources)
        parts = [
            f"{source.name} {source.tokens / max(total, 1):.1%} of the tokens"
            f" ({_thousands(source.tokens)}), epoch {source.epochs:.2f}"
            for source in sources
        ]
        for line in _wrapped(parts, WIDTH - len("  read: ")):
            self.say(f"  read: {line}")

    def held_out(self, step: int, held_out: HeldOut, sees_the_future: bool) -> None:
        """Print the line of an evaluation, one per source, and one with causal routing, if any.

        Args:
            step: Steps done.
            held_out: The losses.
            sees_the_future: Whether routing during training depends on later tokens.
        """
        beginning = f"held out, step {step:>{len(str(self.last_step))}}: "
        line = f"{beginning}{self._with_units(held_out.as_trained)}"
        self.say(f"{line}, routed with later tokens" if sees_the_future else line)
        for name, loss in held_out.sources.items():
            self.say(f"  {name}: {self._with_units(loss.of_modalities)}")
        if held_out.causal is not None:
            label = "routed causally: ".rjust(len(beginning))
            self.say(f"{label}{self._with_units(held_out.causal)}, as in generation")

    def _losses(self, modality_losses: Sequence[float]) -> str:
        return " ".join(
            _loss(name, loss) for name, loss in zip(self.loss_units, modality_losses, strict=True)
        )

    def _with_units(self, modality_losses: Sequence[float]) -> str:
        common = common_unit(self.loss_units.values())
        if common:
            return f"{self._losses(modality_losses)} {common.name}"
        named = zip(self.loss_units.items(), modality_losses, strict=True)
        return ", ".join(f"{_loss(name, loss)} {unit.name}" for (name, unit), loss in named)


def _loss(name: str, loss: float) -> str:
    return f"{name} {'-' if math.isnan(loss) else f'{loss:.3f}'}"


def _wrapped(parts: Sequence[str], width: int) -> list[str]:
    """Join parts by semicolons to as few lines as have at most ``width`` columns."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + len(part) + 2 <= width:
            lines[-1] += f"; {part}"
        else:
            lines.append(part)
    return lines


def duration(seconds: float) -> str:
    """Format seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _thousands(value: float) -> str:
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.1f}{suffix}"
    return f"{value:.0f}"
