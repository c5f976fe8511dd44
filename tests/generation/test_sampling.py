"""Sampling chooses only legal ids and follows the documented distribution exactly."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mot_megatron.errors import ConfigError, TrainingError
from mot_megatron.generation.sampling import SamplingSettings, choose_tokens, draw_uniforms

PROBABILITIES = (0.15, 0.5, 0.05, 0.3)
DRAWS = 2000


def draw_evenly(settings: SamplingSettings, probabilities=PROBABILITIES) -> list[float]:
    """Return the share of each token for evenly spaced uniforms, exact to one draw per token."""
    logits = torch.tensor(probabilities, dtype=torch.float64).log().expand(DRAWS, -1)
    uniforms = (torch.arange(DRAWS, dtype=torch.float64) + 0.5) / DRAWS
    ids = choose_tokens(logits, torch.arange(len(probabilities)), settings, uniforms)
    return (torch.bincount(ids, minlength=len(probabilities)) / DRAWS).tolist()


def expected_share(kept: list[float]) -> list[float]:
    return [share / sum(kept) for share in kept]


def test_draws_follow_the_softmax():
    assert draw_evenly(SamplingSettings()) == pytest.approx(PROBABILITIES, abs=1 / DRAWS)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_sharpens_and_flattens(temperature: float):
    wanted = expected_share([share ** (1 / temperature) for share in PROBABILITIES])
    drawn = draw_evenly(SamplingSettings(temperature=temperature))
    assert drawn == pytest.approx(wanted, abs=1 / DRAWS)


@pytest.mark.parametrize(
    ("top_k", "kept"),
    [(1, [0, 0.5, 0, 0]), (2, [0, 0.5, 0, 0.3]), (3, [0.15, 0.5, 0, 0.3]), (9, PROBABILITIES)],
)
def test_top_k_keeps_the_most_likely_tokens(top_k: int, kept: list[float]):
    drawn = draw_evenly(SamplingSettings(top_k=top_k))
    assert drawn == pytest.approx(expected_share(kept), abs=1 / DRAWS)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.3, [0, 0.5, 0, 0]),  # the most likely token stays even if it alone exceeds top_p
        (0.6, [0, 0.5, 0, 0.3]),
        (0.9, [0.15, 0.5, 0, 0.3]),  # 0.5 + 0.3 = 0.8 is below 0.9
        (0.99, PROBABILITIES),
        (1.0, PROBABILITIES),
    ],
)
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p: float, kept: list[float]):
    drawn = draw_evenly(SamplingSettings(top_p=top_p))
    assert drawn == pytest.approx(expected_share(kept), abs=1 / DRAWS)


def test_top_p_applies_after_top_k():
    # Top-k leaves 0.5 and 0.3; the first then has probability 0.5 / 0.8 = 0.625.
    drawn = draw_evenly(SamplingSettings(top_k=2, top_p=0.62))
    assert drawn == [0, 1, 0, 0]


def test_greedy_chooses_the_most_likely_token_and_the_lowest_id_of_equals():
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0], [9.0, 3.0, 1.0, 3.0]])
    legal = torch.tensor([1, 2, 3])
    ids = choose_tokens(logits, legal, SamplingSettings(temperature=0), torch.ones(2) * 0.99)
    assert ids.tolist() == [1, 1]


def test_a_tiny_temperature_is_greedy():
    logits = torch.tensor([[-3e4, 3e4, 2e4]])
    settings = SamplingSettings(temperature=1e-300)
    ids = choose_tokens(logits, torch.arange(3), settings, torch.tensor([0.999]).double())
    assert ids.tolist() == [1]


def test_only_legal_ids_are_chosen():
    logits = torch.full((DRAWS, 64), 50.0)
    legal = torch.tensor([3, 17, 40])
    logits[:, legal] = -50.0
    uniforms = draw_uniforms(0, DRAWS, 1)[:, 0]
    ids = choose_tokens(logits, legal, SamplingSettings(), uniforms)
    assert set(ids.tolist()) == {3, 17, 40}


def test_the_largest_uniform_chooses_the_last_kept_token():
    for top_p in (0.5, 1.0):
        uniforms = torch.tensor([1 - 2**-53], dtype=torch.float64)
        settings = SamplingSettings(top_p=top_p)
        ids = choose_tokens(torch.zeros(1, 4), torch.arange(4), settings, uniforms)
        assert ids.tolist() == [1 if top_p == 0.5 else 3]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_an_error(bad: float):
    logits = torch.tensor([[0.0, bad]])
    with pytest.raises(TrainingError, match="not finite"):
        choose_tokens(logits, torch.arange(2), SamplingSettings(), torch.zeros(1).double())


def test_random_numbers_of_a_sample_do_not_depend_on_other_samples():
    many, one = draw_uniforms(5, 4, 8), draw_uniforms(5, 1, 3)
    assert torch.equal(many[:1, :3], one)
    assert torch.equal(many, draw_uniforms(5, 4, 8))
    assert len(set(many.flatten().tolist())) == 32
    assert not torch.equal(many, draw_uniforms(6, 4, 8))
    assert many.min() >= 0
    assert many.max() < 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("num_samples", 0),
        ("max_tokens", 0),
    ],
)
def test_illegal_settings_are_errors(field: str, value: Any):
    with pytest.raises(ConfigError, match=f"{field} = {value}, expected "):
        SamplingSettings(**{field: value})
