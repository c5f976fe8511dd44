"""The TensorBoard log of a run: scalars, samples, figures and a "Custom Scalars" dashboard."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard import summary as summaries

from mot_megatron.config_model import LossUnit, common_unit
from mot_megatron.data.blend_stream import SourceProgress
from mot_megatron.data.codebooks.mel import SAMPLE_RATE
from mot_megatron.files import write_atomically
from mot_megatron.job.outputs import write_line
from mot_megatron.run.event_files import EventWriter
from mot_megatron.train.interval import Interval
from mot_megatron.train.state import Progress
from mot_megatron.train.step import HeldOut

Charts = dict[str, list[str | list[str]]]
"""Charts of one section of the dashboard, by title: [kind, patterns of tags]."""

GIB = 2**30
LEAST_PIXELS = 128
"""Smaller images are enlarged to this height or less, because TensorBoard blurs them."""
_TITLE_LETTERS = 60
DASHBOARD_FILE = "dashboard.json"
"""File in the folder of the event files with the dashboard sections of all parts of the run."""


def _say(line: str) -> None:
    write_line(2, line)


class TensorBoardLog:
    """Writes the event files of a run. Only the first rank has one.

    Writing never raises an error: if the disk is full, points are lost.
    """

    def __init__(
        self,
        directory: Path,
        loss_units: Mapping[str, LossUnit],
        towers: Sequence[str],
        start_step: int,
        modality_parallel: bool = False,
        experts: Charts | None = None,
        sources: Sequence[str] = (),
        say: Callable[[str], None] = _say,
    ) -> None:
        """Open a new event file and hide points of earlier files from ``start_step`` on.

        Args:
            directory: Folder of the event files.
            loss_units: Modality name -> unit of its losses, in the order of the modalities.
            towers: Tower names, by tower index.
            start_step: First step that will be written: the one after the resumed step, or 1.
            modality_parallel: Whether to show the load balance within modality groups.
            experts: Charts about routing; None without experts.
            sources: Names of the sources of a blend.
            say: Prints a line when points are lost.
        """
        self.modalities = tuple(loss_units)
        self.towers = tuple(towers)
        self.writer = EventWriter(directory, start_step, say)
        self.modality_parallel = modality_parallel
        self.progress_step = -1
        dashboard = _dashboard(loss_units)
        if modality_parallel:
            dashboard["4 Modality parallelism"] = {
                "FLOPs of the busiest rank over the mean": [
                    "Multiline",
                    ["modality_parallel/imbalance"],
                ],
                "percent of the step that the others wait": [
                    "Multiline",
                    ["modality_parallel/waiting_percent"],
                ],
            }
        if experts:
            dashboard["5 Experts"] = experts
        if sources:
            dashboard["6 Sources"] = {
                "tokens read of each source": ["Multiline", ["sources/tokens/.*"]],
                "epochs of each source": ["Multiline", ["sources/epochs/.*"]],
                "held out, all modalities, bits per token": [
                    "Multiline",
                    ["sources/loss_total/.*"],
                ],
            }
        dashboard = _with_earlier_sections(directory / DASHBOARD_FILE, dashboard)
        self.writer.write(lambda writer: writer.add_custom_scalars(dashboard))

    def log_interval(self, step: int, interval: Interval, mfu: float, memory_bytes: int) -> None:
        """Write the scalars of a log interval.

        Args:
            step: Steps done.
            interval: Statistics of the steps since the last report.
            mfu: Model FLOPs utilization, 0 to 1.
            memory_bytes: Peak device memory of the rank that used most.
        """
        seconds = interval.seconds
        scalars: dict[str, float] = {
            "gradient_norm/total": interval.norms.total,
            "gradient_norm/shared": interval.norms.shared,
            "learning_rate": interval.learning_rate,
            "tokens_per_second/total": interval.tokens_per_second,
            "loss_total/train": interval.total_loss,
            "step_seconds/total": seconds.total,
            "step_seconds/data": seconds.data,
            "step_seconds/forward_backward": seconds.forward_backward,
            "step_seconds/optimizer": seconds.optimizer,
            "utilization/mfu_percent": 100 * mfu,
            "memory/peak_gib": memory_bytes / GIB,
        }
        if self.modality_parallel:
            scalars["modality_parallel/imbalance"] = interval.imbalance
            scalars["modality_parallel/waiting_percent"] = interval.imbalance_percent
        for tower, norm in zip(self.towers, interval.norms.per_tower, strict=True):
            scalars[f"gradient_norm/tower_{tower}"] = norm
        for name, rate in zip(self.modalities, interval.modality_rates, strict=True):
            scalars[f"tokens_per_second/{name}"] = rate
        for name, loss in zip(self.modalities, interval.modality_losses, strict=True):
            scalars[f"loss_train/{name}"] = loss
        self.log_scalars(scalars, step)

    def log_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        """Write points by tag, except NaN, the loss of a modality without labels."""

        def add(writer: SummaryWriter) -> None:
            for tag, value in scalars.items():
                if not math.isnan(value):
                    writer.add_scalar(tag, value, step)

        self.writer.write(add)

    def log_held_out(self, step: int, held_out: HeldOut, apart: bool = False) -> None:
        """Write the held-out losses of every modality.

        Args:
            step: Steps done.
            held_out: Losses to write.
            apart: Write them under separate tags, because they are of the whole split in a run
                that otherwise evaluates a part of it.
        """
        tag = "loss_held_out_whole" if apart else "loss_held_out"
        losses = {tag: held_out.as_trained}
        if held_out.causal is not None:
            losses[f"{tag}_causal"] = held_out.causal
        for prefix, of_modalities in losses.items():
            pairs = zip(self.modalities, of_modalities, strict=True)
            self.log_scalars({f"{prefix}/{name}": bits for name, bits in pairs}, step)
        for source, loss in held_out.sources.items():
            pairs = zip(self.modalities, loss.of_modalities, strict=True)
            prefix = f"{tag.replace('loss', 'sources/loss')}/{source}"
            self.log_scalars({f"{prefix}/{name}": bits for name, bits in pairs}, step)
            if not apart:
                self.log_scalars({f"sources/loss_total/{source}": loss.total}, step)
        if not apart:
            self.log_scalars({"loss_total/held_out": held_out.total}, step)
        self.writer.flush()

    def log_sources(self, step: int, sources: Sequence[SourceProgress]) -> None:
        """Write the tokens read of each source of a blend, and its epochs."""
        for source in sources:
            scalars = {
                f"sources/tokens/{source.name}": float(source.tokens),
                f"sources/epochs/{source.name}": source.epochs,
            }
            self.log_scalars(scalars, step)

    def log_save(self, step: int, stall_seconds: float, write_seconds: float) -> None:
        """Write how long a save stopped training, and how long it took to write."""
        scalars = {
            "checkpoint/stall_seconds": stall_seconds,
            "checkpoint/write_seconds": write_seconds,
        }
        self.log_scalars(scalars, step)

    def log_figure(self, tag: str, figure: Figure, step: int) -> None:
        """Write a figure that was made without pyplot."""
        self.writer.write(lambda writer: writer.add_figure(tag, figure, step, close=False))

    def log_progress(self, progress: Progress) -> None:
        """Write tokens, seconds and FLOPs so far, as alternative x axes; at most once per step."""
        if progress.steps == self.progress_step:
            return
        self.progress_step = progress.steps
        scalars = {
            "progress/tokens": float(progress.tokens),
            "progress/seconds": progress.seconds,
            "progress/flops": progress.flops,
        }
        self.log_scalars(scalars, progress.steps)

    def log_text(self, tag: str, text: str, step: int) -> None:
        """Write a text as a preformatted block, which keeps its line breaks."""
        block = "```\n" + text + "\n```"
        self.writer.write(lambda writer: writer.add_text(tag, block, step))

    def log_media(
        self,
        tag: str,
        media: str | np.ndarray,
        step: int,
        description: str = "",
        sample_rate: int = SAMPLE_RATE,
    ) -> None:
        """Write the output of a codec: text, an image [h, w, 3] uint8, or audio [n] float32.

        The first line of the description is part of the title of an image or sound, and the whole
        is shown on request; texts do not show it.
        """
        if isinstance(media, str):
            self.log_text(tag, media, step)
            return
        if media.ndim == 3:
            factor = max(1, LEAST_PIXELS // media.shape[0])
            enlarged = media.repeat(factor, axis=0).repeat(factor, axis=1)
            summary = summaries.image(tag, enlarged, dataformats="HWC")
        else:
            summary = summaries.audio(tag, media[None], sample_rate=sample_rate)
        if description:
            # SummaryWriter has no argument for these.
            metadata = summary.value[0].metadata
            metadata.display_name = f"{tag}: {description.splitlines()[0][:_TITLE_LETTERS]}"
            metadata.summary_description = description
        self.writer.write(lambda writer: writer._get_file_writer().add_summary(summary, step))

    def close(self) -> None:
        """Flush and close the event file."""
        self.writer.close()


def _with_earlier_sections(file: Path, dashboard: dict[str, Charts]) -> dict[str, Charts]:
    """Merge ``dashboard`` into the sections stored in ``file``, and store the result.

    TensorBoard shows only the last dashboard of a run, but points of earlier parts of the run still
    need their sections. If the file cannot be read or written, ``dashboard`` is returned unchanged.
    """
    try:
        earlier = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        merged = dict(sorted({**earlier, **dashboard}.items()))
        write_atomically(file, json.dumps(merged, indent=1))
    except (OSError, ValueError, TypeError):
        return dashboard
    return merged


def _dashboard(loss_units: Mapping[str, LossUnit]) -> dict[str, Charts]:
    """Return the sections of the "Custom Scalars" page, the most important first.

    Tags are regular expressions. Charts do not depend on towers or the layout, so that several runs
    share them: TensorBoard shows a chart twice if two runs define it with different tags.
    """

    def chart(*tags: str) -> list[str | list[str]]:
        return ["Multiline", list(tags)]

    common = common_unit(loss_units.values())
    of_all = common.name if common else "each in its unit"
    losses: Charts = {
        f"all modalities: in training, {of_all}": chart("loss_total/train"),
        f"all modalities: held out, {of_all}": chart("loss_total/held_out"),
    }
    for name, unit in loss_units.items():
        losses[f"{name}: in training, {unit.name}"] = chart(f"loss_train/{name}$")
        losses[f"{name}: held out, {unit.name}"] = chart(f"loss_held_out(_causal)?/{name}$")
    return {
        "1 Loss": losses,
        "2 Optimization": {
            "gradient norm of all weights, the shared ones and each tower": chart(
                "gradient_norm/.*"
            ),
            "learning rate": chart("learning_rate"),
        },
        "3 Speed": {
            "tokens per second, in total and by modality": chart("tokens_per_second/.*"),
            "seconds per step and their parts": chart("step_seconds/.*"),
            "model FLOPs utilization, percent": chart("utilization/mfu_percent"),
            "peak memory of the fullest rank, GiB": chart("memory/peak_gib"),
            "seconds of a checkpoint: written, and with training stopped": chart("checkpoint/.*"),
            "tokens so far": chart("progress/tokens"),
            "model FLOPs so far": chart("progress/flops"),
            "seconds of training so far": chart("progress/seconds"),
        },
    }
