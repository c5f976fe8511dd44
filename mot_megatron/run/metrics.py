"""TensorBoard: scalars per step, held-out losses, and a layout so that the page opens in order."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from mot_megatron.data.codebooks.mel import SAMPLE_RATE
from mot_megatron.train.interval import Interval
from mot_megatron.train.state import Progress
from mot_megatron.train.step import HeldOut

Charts = dict[str, list[str | list[str]]]
"""One page of TensorBoard's "Custom Scalars": kind and tags of every chart, by title."""

GIB = 2**30
PIXELS_PER_PIXEL = 4
"""Enlargement of pictures: TensorBoard shows 32 pixels as a smudge."""


class TensorBoardLog:
    """Writes one run's event files; made on the first rank only."""

    def __init__(
        self,
        directory: Path,
        modalities: Sequence[str],
        towers: Sequence[str],
        start_step: int,
        modality_parallel: bool = False,
        causal_loss: bool = False,
        experts: Charts | None = None,
    ) -> None:
        """Open ``directory``; what an earlier part of the run wrote after ``start_step`` is hidden.

        Args:
            directory: Folder of the event files.
            modalities: Names, by modality index.
            towers: Names, by tower index.
            start_step: First step that will be written: the resumed one, or 0.
            modality_parallel: Whether to show how equal the work of a modality group's ranks is.
            causal_loss: Whether held-out losses come routed causally too.
            experts: Charts about routing, if there are experts.
        """
        self.modalities = tuple(modalities)
        self.towers = tuple(towers)
        self.writer = SummaryWriter(str(directory), purge_step=start_step)
        self.modality_parallel = modality_parallel
        self.progress_step = -1
        layout = _layout(self.modalities, self.towers, causal_loss)
        if modality_parallel:
            layout["4 Modality parallelism"] = {
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
            layout["5 Experts"] = experts
        self.writer.add_custom_scalars(layout)

    def log_interval(self, step: int, interval: Interval, mfu: float, memory_bytes: int) -> None:
        """Write what the steps up to ``step`` did; ``step`` counts steps done."""
        seconds = interval.seconds
        scalars: dict[str, float] = {
            "gradient_norm/total": interval.norms.total,
            "gradient_norm/shared": interval.norms.shared,
            "learning_rate": interval.learning_rate,
            "tokens_per_second/total": interval.tokens_per_second,
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
        for name, bits in zip(self.modalities, interval.modality_bits, strict=True):
            scalars[f"loss_train/{name}"] = bits
        self.log_scalars(scalars, step)

    def log_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        """Write points by tag; a modality without labels has no loss: no point, not a NaN point."""
        for tag, value in scalars.items():
            if not math.isnan(value):
                self.writer.add_scalar(tag, value, step)

    def log_held_out(self, step: int, held_out: HeldOut, apart: bool = False) -> None:
        """Write the held-out losses of every modality, in bits per token.

        Args:
            step: Steps done.
            held_out: To write.
            apart: Of the whole split in a run that else evaluates a part: under tags of their own.
        """
        tag = "loss_held_out_whole" if apart else "loss_held_out"
        losses = {tag: held_out.as_trained}
        if held_out.causal is not None:
            losses[f"{tag}_causal"] = held_out.causal
        for prefix, of_modalities in losses.items():
            pairs = zip(self.modalities, of_modalities, strict=True)
            self.log_scalars({f"{prefix}/{name}": bits for name, bits in pairs}, step)
        self.writer.flush()

    def log_figure(self, tag: str, figure: Figure, step: int) -> None:
        """Write a picture that is in none of pyplot's windows."""
        self.writer.add_figure(tag, figure, step, close=False)

    def log_progress(self, progress: Progress) -> None:
        """Write what the run has taken so far, once per step: the other axes of its curves."""
        if progress.steps == self.progress_step:
            return
        self.progress_step = progress.steps
        self.writer.add_scalar("progress/tokens", progress.tokens, progress.steps)
        self.writer.add_scalar("progress/seconds", progress.seconds, progress.steps)
        if not math.isnan(progress.flops):
            self.writer.add_scalar("progress/flops", progress.flops, progress.steps)

    def log_text(self, tag: str, text: str, step: int) -> None:
        """Write a text as a block that keeps its lines."""
        self.writer.add_text(tag, "```\n" + text + "\n```", step)

    def log_media(self, tag: str, media: str | np.ndarray, step: int) -> None:
        """Write what a codec decoded: a text, a picture [h, w, 3] uint8, or a sound [n] float32."""
        if isinstance(media, str):
            self.log_text(tag, media, step)
        elif media.ndim == 3:
            enlarged = media.repeat(PIXELS_PER_PIXEL, axis=0).repeat(PIXELS_PER_PIXEL, axis=1)
            self.writer.add_image(tag, enlarged, step, dataformats="HWC")
        else:
            self.writer.add_audio(tag, media[None], step, sample_rate=SAMPLE_RATE)

    def close(self) -> None:
        """Flush and close the event file."""
        self.writer.close()


def _layout(
    modalities: Sequence[str], towers: Sequence[str], causal_loss: bool
) -> dict[str, Charts]:
    """The "Custom Scalars" page: what a person asks first stands first."""

    def chart(prefix: str, names: Sequence[str]) -> list[str | list[str]]:
        return ["Multiline", [f"{prefix}/{name}" for name in names]]

    kinds = ["loss_train", "loss_held_out"] + ["loss_held_out_causal"] * causal_loss
    losses: Charts = {
        f"{name}: train and held out, bits per token": [
            "Multiline",
            [f"{kind}/{name}" for kind in kinds],
        ]
        for name in modalities
    }
    gradient_names = ("total", "shared", *(f"tower_{tower}" for tower in towers))
    return {
        "1 Loss": losses,
        "2 Optimization": {
            "gradient norm per tower": chart("gradient_norm", gradient_names),
            "learning rate": ["Multiline", ["learning_rate"]],
        },
        "3 Speed": {
            "tokens per second": chart("tokens_per_second", ("total", *modalities)),
            "seconds per step": chart("step_seconds", ("data", "forward_backward", "optimizer")),
            "model FLOPs utilization, percent": chart("utilization", ("mfu_percent",)),
            "peak memory of the fullest rank, GiB": chart("memory", ("peak_gib",)),
            "tokens so far": chart("progress", ("tokens",)),
            "model FLOPs so far": chart("progress", ("flops",)),
            "seconds of training so far": chart("progress", ("seconds",)),
        },
    }
