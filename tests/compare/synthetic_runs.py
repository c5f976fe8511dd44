"""Runs with curves of known slope s: the candidate reaches the baseline's loss at t at s * t."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from mot_megatron.compare.curves import Curve, RunCurves, RunIdentity, Split
from mot_megatron.config_files import parse_config
from mot_megatron.config_model import BITS_PER_TOKEN
from mot_megatron.run.metrics import TensorBoardLog
from mot_megatron.train.state import Progress
from tests.small_runs import CONFIG

LAST_STEP = 1500
FLOPS_PER_STEP, TOKENS_PER_STEP = 2e12, 4096
MODALITIES = ("text", "image", "speech")

CORPUS = """
format = 1
name = "synthetic"
builder = "tests 1"
seed = 0
vocab_size = 192
pad_token = 0
modalities = [
  {{ name = "text", first_id = 0, size = {text_size} }},
  {{ name = "image", first_id = {text_size}, size = {image_size} }},
  {{ name = "speech", first_id = 160, size = 32 }},
]
[splits.train]
documents = 2
tokens = 20
tokens_per_modality = {{ text = 10, image = 5, speech = 5 }}
longest_document = 10
sha256 = {{ bin = "{digest}", idx = "1" }}
[splits.validation]
documents = 1
tokens = 10
tokens_per_modality = {{ text = 5, image = 5, speech = 0 }}
longest_document = 10
sha256 = {{ bin = "2", idx = "3" }}
"""

Loss = Callable[[np.ndarray], np.ndarray]
"""Steps -> bits per token."""


def power_law(steps: np.ndarray) -> np.ndarray:
    """Return losses that fall from 4.0 bits after 5 steps to 2.8 after 1500."""
    return 1.8 + 6 * (steps + 50.0) ** -0.25


def losses(slope: float, noise: float = 0.0, seed: int = 0) -> Loss:
    """Return a loss that needs ``slope`` of the power law's steps, with normal noise."""
    rng = np.random.default_rng(seed)
    return lambda steps: power_law(steps / slope) + rng.normal(0, noise, len(steps))


def seeing_the_future(run: RunCurves) -> RunCurves:
    """Return the same curves for a model with expert choice."""
    identity = run.identity.model_copy(update={"sees_the_future": True})
    return dataclasses.replace(run, identity=identity)


def log_steps(points: int, last: int = LAST_STEP) -> np.ndarray:
    """Return equally spaced steps up to the last."""
    return np.round(np.linspace(last / points, last, points)).astype(np.int64)


def curves(
    loss: Loss,
    *,
    points: int = 300,
    last: int = LAST_STEP,
    splits: Sequence[Split] = ("train", "held_out"),
    seconds_per_step: float = 0.5,
    modalities: Sequence[str] = ("text",),
    seed: int = 0,
    name: str = "run",
) -> RunCurves:
    """Return a run in memory; its curves are equal, apart from noise."""
    steps = log_steps(points, last)
    return RunCurves(
        source=Path(name),
        identity=identity(name=name, seed=seed),
        curves={
            (split, modality): Curve(steps, loss(steps))
            for split in splits
            for modality in modalities
        },
        steps=steps,
        tokens=steps * float(TOKENS_PER_STEP),
        flops=steps * FLOPS_PER_STEP,
        seconds=steps * seconds_per_step,
    )


def identity(**changes: object) -> RunIdentity:
    """Return the identity of a run on the synthetic corpus."""
    values = {
        "name": "run",
        "seed": 0,
        "corpus": "synthetic",
        "splits": {"train": "aa", "validation": "bb"},
        "vocabulary": ("text 100 none", "image 60 none"),
        "towers": ("text", "image"),
        "parameters": 1000,
        "sees_the_future": False,
        "pool_sequences": None,
        "seq_length": 512,
        "held_out_sequences": 64,
        "step_sequences": 8,
        "train_steps": LAST_STEP,
        "configuration": "cc",
    }
    return RunIdentity.model_validate(values | changes)


def write_run(
    runs: Path,
    name: str,
    points: Mapping[str, Mapping[int, float]],
    *overrides: str,
    progress: Mapping[int, Progress] | None = None,
) -> Path:
    """Write a run's folder as training does, and return it.

    Args:
        runs: Folder of runs.
        name: Name of the run.
        points: Tag, for example loss_train/text -> step -> value.
        overrides: Overrides of its configuration.
        progress: Progress to log, by step; None: proportional to the step, at every step.
    """
    directory = runs / name
    directory.mkdir(parents=True, exist_ok=True)
    settings = [f"run.name={name}", "model.vocab_size=256", *overrides]
    config = parse_config(CONFIG.format(corpus="corpus"), "small.toml", settings)
    (directory / "config.toml").write_text(config.to_toml())
    write_description(directory)
    steps = sorted({step for values in points.values() for step in values})
    if progress is None:
        progress = {step: progress_at(step) for step in steps}
    log = TensorBoardLog(
        directory / "tensorboard",
        dict.fromkeys(MODALITIES, BITS_PER_TOKEN),
        ("only",),
        start_step=1,
    )
    for step in steps:
        if step in progress:
            log.log_progress(progress[step])
        for tag, values in points.items():
            if step in values:
                log.log_scalars({tag: values[step]}, step)
    log.close()
    return directory


def progress_at(step: int) -> Progress:
    """Return a progress proportional to the step."""
    return Progress(step, 0.5 * step, TOKENS_PER_STEP * step, FLOPS_PER_STEP * step)


def write_description(directory: Path, text_size: int = 100, digest: str = "0") -> None:
    """Write a corpus.toml whose tokens have ``digest``."""
    text = CORPUS.format(text_size=text_size, image_size=160 - text_size, digest=digest)
    (directory / "corpus.toml").write_text(text)


def points_of(
    loss: Loss, points: int, last: int = LAST_STEP, averaged: bool = False
) -> dict[int, float]:
    """Return the points of a curve, as ``write_run`` takes them for a tag.

    Args:
        loss: Of a step.
        points: How many.
        last: Last step.
        averaged: Whether points are means over the steps since the previous one.
    """
    steps = log_steps(points, last)
    starts = np.concatenate(([0], steps[:-1]))
    bits = [
        loss(np.arange(start, step) + 1.0).mean() for start, step in zip(starts, steps, strict=True)
    ]
    return dict(zip(steps.tolist(), bits if averaged else loss(steps).tolist(), strict=True))
