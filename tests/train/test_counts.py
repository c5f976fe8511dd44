"""The imbalance of modality groups in the global counts of a step."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mot_megatron.model.flops import step_flops
from mot_megatron.model.micro_batch import ExchangePlan
from mot_megatron.parallel.groups import build_single_process_groups
from mot_megatron.train.counts import GlobalCounts
from tests.model.small_models import random_tokens, small_config

NAMES = ["text", "image"]


def imbalance_of(
    rank_tokens: tuple[int, int], rank_pairs: tuple[int, int], *overrides: str
) -> float:
    """Return the imbalance of two ranks that hold a tower each."""
    config = small_config({name: name for name in NAMES}, *overrides)
    nothing = torch.zeros(0, dtype=torch.int64)
    of_towers = ((rank_tokens[0], 0), (0, rank_tokens[1]))
    plan = ExchangePlan(((0,),), (0,), nothing, nothing, of_towers, rank_tokens, rank_pairs)
    batch = dataclasses.replace(random_tokens(0, NAMES, (1, 1)).micro_batch(config), exchange=plan)
    groups = build_single_process_groups(torch.device("cpu"))
    return GlobalCounts.gather([batch, batch], config.model, groups).imbalance


def test_equal_ranks_have_imbalance_one() -> None:
    assert imbalance_of((40, 40), (100, 100)) == 1.0


def test_imbalance_of_unequal_tokens() -> None:
    assert imbalance_of((60, 20), (0, 0)) == pytest.approx(1.5)  # 60 / 40


def test_imbalance_counts_the_experts_of_a_token() -> None:
    experts = "model.towers.image.experts={num_moe_experts=4,capacity_factor=2.0}"
    model = small_config({name: name for name in NAMES}, experts).model
    text, image = (step_flops(model, tokens, 0, 1).total for tokens in ([1, 0], [0, 1]))
    # Two feed-forward networks of 3 * 32 * 40 in place of one, and a router of 4 * 32, in 2 layers.
    assert image - text == 6 * 2 * (3 * 32 * 40 + 4 * 32)
    assert imbalance_of((40, 40), (0, 0), experts) == pytest.approx(2 * image / (text + image))


def test_only_rows_with_a_label_reach_the_head() -> None:
    model = small_config({name: name for name in NAMES}).model
    tokens = ((30, 10), (31, 11), (32, 16))  # of labels, documents and slots
    counts = GlobalCounts(*tokens, attended_pairs=0, imbalance=1.0, stop=False)
    everything = GlobalCounts((32, 16), *tokens[1:], attended_pairs=0, imbalance=1.0, stop=False)
    # 8 rows of 48 lack a label: each would be 2 * 32 * 128 operations, three times.
    assert everything.flops(model) - counts.flops(model) == 8 * 3 * 2 * 32 * 128


def test_imbalance_adds_the_maxima_inside_and_outside_attention() -> None:
    """Less attention on the rank with more tokens does not balance the ranks."""
    model = small_config({name: name for name in NAMES}).model
    per_token = step_flops(model, [1, 0], 0, 1).total
    per_pair = step_flops(model, [0, 0], 1, 0).total
    pairs = 30 * per_token // per_pair
    # One rank has 60 tokens' worth of work and the other 30 and 30: together 1.5 of the mean.
    assert imbalance_of((60, 30), (0, pairs)) == pytest.approx(90 / 60, rel=1e-3)
