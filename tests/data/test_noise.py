"""Noise of vectors: how it is mixed in, and the times that are drawn."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mot_megatron.config_model import ObjectiveConfig
from mot_megatron.data.noise import draw_time, noised, signal_share

FLOW, DIFFUSION = (ObjectiveConfig(kind=kind) for kind in ("flow_matching", "diffusion"))
UNIFORM = ObjectiveConfig(kind="flow_matching", times="uniform")


def test_flow_matching_goes_from_data_to_noise_on_a_line() -> None:
    random = np.random.default_rng(0)
    clean, noise = random.normal(size=(2, 5, 3))
    for time in (0.0, 0.25, 1.0):
        found = noised("flow_matching", clean, time, noise)
        np.testing.assert_allclose(found.inputs, clean + time * (noise - clean), atol=1e-6)
        np.testing.assert_allclose(found.targets, noise - clean, atol=1e-6)
        # From any time, the velocity leads to the noise.
        rest = (1 - time) * found.targets
        np.testing.assert_allclose(found.inputs + rest, noise, atol=1e-6)


def test_diffusion_keeps_the_variance() -> None:
    random = np.random.default_rng(0)
    clean, noise = random.normal(size=(2, 200_000, 1))
    for time in (0.001, 0.3, 1.0):
        found = noised("diffusion", clean, time, noise)
        np.testing.assert_array_equal(found.targets, noise.astype(np.float32))
        assert found.inputs.var() == pytest.approx(1, abs=0.02)


def test_the_cosine_schedule() -> None:
    assert signal_share(0.0) == 1.0
    assert signal_share(1.0) == pytest.approx(0.0, abs=1e-12)
    half = math.cos(0.508 / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)
    assert signal_share(0.5) == pytest.approx(half**2)


@pytest.mark.parametrize("limit", [1.0, 0.5])
@pytest.mark.parametrize(
    ("objective", "mean"), [(FLOW, 0.5), (UNIFORM, 0.5), (DIFFUSION, 0.5)], ids=str
)
def test_times(objective: ObjectiveConfig, mean: float, limit: float) -> None:
    generator = np.random.default_rng(0)
    times = np.array([draw_time(objective, limit, generator) for _ in range(4000)])
    assert times.min() >= 0
    assert times.max() <= limit
    assert times.mean() == pytest.approx(mean * limit, abs=0.02)
    if objective is DIFFUSION:
        np.testing.assert_allclose(times * 1000, np.rint(times * 1000))
        assert times.min() > 0
    # Standard deviations of a logit-normal and of a uniform number.
    spread = 0.208 if objective is FLOW else 1 / 12**0.5
    assert times.std() == pytest.approx(spread * limit, abs=0.01)
