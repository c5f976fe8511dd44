"""Traces of chosen steps: torch's profiler, and a table of where the time went.

The run's folder ``traces`` then has, for every chosen rank, a trace that TensorBoard's profiler
plugin, Perfetto and Chrome open, and the table of its operators. The first of the ranks also prints
by what cause the time of the next step was spent, with the same causes as reports of scaling.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from mot_megatron.files import write_atomically
from mot_megatron.parallel.axes import axes_of
from mot_megatron.run.step_clock import StepClock, split_step
from mot_megatron.train.session import Trainer
from mot_megatron.train.step import StepResult

_OPERATORS = 25
"""Rows of the table of operators."""
_LONGEST_NAME = 40


class StepProfiler:
    """Traces the steps of ``training.profile_steps`` on this rank, if it is chosen."""

    def __init__(self, trainer: Trainer, directory: Path, say: Callable[[str], None]) -> None:
        """Prepare; nothing is recorded yet.

        Args:
            trainer: What is trained.
            directory: Folder of the run.
            say: Prints a line.
        """
        training, rank = trainer.config.training, trainer.groups.rank
        steps = training.profile_steps if rank in training.profile_ranks else None
        self._first, self._last = steps or (0, 0)
        self._prints = steps is not None and rank == training.profile_ranks[0]
        self._trainer = trainer
        self._say = say
        self._stem = directory / "traces" / f"rank_{rank}.{self._first}"
        self._on_gpu = trainer.groups.device.type == "cuda"
        self._profile: profile | None = None

    @contextlib.contextmanager
    def around(self, step: int) -> Iterator[Callable[[StepResult], None]]:
        """Record a step, if it is one of the chosen, and write the trace after the last.

        The step after the last is divided by cause on the rank that prints. This slows it down and
        would distort the trace.

        Yields:
            A function to call with the result of the step.
        """
        if self._prints and step == self._last + 1:
            trainer = self._trainer
            axes = axes_of(trainer.groups, trainer.config.model.tower_names)
            clock = StepClock(axes, trainer.progress_report, trainer.groups.device)
            with clock:
                yield lambda result: self._say_split(split_step(result.seconds, clock.take()))
            return
        if self._first <= step <= self._last:
            self._start()
        yield lambda _: None
        if step == self._last:
            self.close()

    def _start(self) -> None:
        if self._profile is None:
            activities = [ProfilerActivity.CPU]
            if self._on_gpu:
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities)
            self._profile.start()

    def close(self) -> None:
        """Write what was recorded; nothing if nothing was."""
        if self._profile is None:
            return
        self._profile.stop()
        recorded, self._profile = self._profile, None
        trace = self._stem.with_name(f"{self._stem.name}.pt.trace.json")
        try:
            trace.parent.mkdir(exist_ok=True)
            recorded.export_chrome_trace(str(trace))
            table = recorded.key_averages().table(
                sort_by=f"self_{'cuda' if self._on_gpu else 'cpu'}_time_total",
                row_limit=_OPERATORS,
                max_name_column_width=_LONGEST_NAME,
            )
            write_atomically(self._stem.with_name(f"{self._stem.name}.operators.txt"), table)
        except OSError as error:
            # A full disk must not end the run.
            self._say(f"{trace.parent}: the trace cannot be written: {error.strerror}")
            return
        if self._prints:
            self._say(f"traced from step {self._first} on: {trace}")

    def _say_split(self, split: Mapping[str, float]) -> None:
        rank = self._trainer.groups.rank
        self._say(f"step {self._last + 1} on rank {rank}:\n{split_text(split)}")


def split_text(split: Mapping[str, float]) -> str:
    """Return a table of seconds by cause, the largest first; causes without time are left out."""
    total = sum(split.values())
    return "\n".join(
        f"  {cause:32}{1000 * seconds:10.1f} ms{seconds / total:8.1%}"
        for cause, seconds in sorted(split.items(), key=lambda item: -item[1])
        if seconds > 0
    )
