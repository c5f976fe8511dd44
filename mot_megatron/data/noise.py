"""Noise for continuous modalities, drawn on the host.

Every image has a generator of its own, seeded by its place in the stream of sequences, so all ranks
and resumed runs draw the same without communication. Letters: n positions of an image, w its width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from mot_megatron.config_model import ObjectiveConfig

DIFFUSION_STEPS = 1000
"""Steps of the diffusion process; a model sees step k as the time k / 1000."""
_COSINE_OFFSET = 0.008
"""Keeps the first steps from having almost no noise (Nichol and Dhariwal, arXiv 2102.09672)."""


@dataclass(frozen=True)
class Noised:
    """An image between data and noise."""

    inputs: np.ndarray
    """[n, w] fp32: what the model sees."""
    targets: np.ndarray
    """[n, w] fp32: what it predicts."""
    time: float
    """0: data, 1: noise."""


def noised(kind: str, clean: np.ndarray, time: float, noise: np.ndarray) -> Noised:
    """Mix an image [n, w] with noise of the same shape."""
    clean, noise = clean.astype(np.float32), noise.astype(np.float32)
    return _MIXED[kind](clean, time, noise)


def _flow_matching(clean: np.ndarray, time: float, noise: np.ndarray) -> Noised:
    """Mix on a straight line; the target is the velocity along it."""
    t = np.float32(time)
    return Noised((1 - t) * clean + t * noise, noise - clean, time)


def _diffusion(clean: np.ndarray, time: float, noise: np.ndarray) -> Noised:
    """Mix by the cosine schedule; the target is the noise."""
    kept = np.float32(signal_share(time))
    return Noised(np.sqrt(kept) * clean + np.sqrt(1 - kept) * noise, noise, time)


_MIXED: Mapping[str, Callable[[np.ndarray, float, np.ndarray], Noised]] = {
    "flow_matching": _flow_matching,
    "diffusion": _diffusion,
}


def signal_share(time: float) -> float:
    """Return the share of the variance that is data, of the cosine schedule at ``time``."""

    def at(t: float) -> float:
        return float(np.cos((t + _COSINE_OFFSET) / (1 + _COSINE_OFFSET) * np.pi / 2) ** 2)

    return at(time) / at(0.0)


def draw_time(objective: ObjectiveConfig, limit: float, generator: np.random.Generator) -> float:
    """Draw a time for training; ``limit`` is the largest one, and scales the others."""
    if objective.kind == "diffusion":
        steps = max(1, int(limit * DIFFUSION_STEPS))
        return int(generator.integers(1, steps + 1)) / DIFFUSION_STEPS
    if objective.times == "uniform":
        return limit * float(generator.random())
    return limit / (1 + float(np.exp(-generator.normal())))
