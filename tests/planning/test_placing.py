"""Placements balance the FLOPs of the corpus's tokens, or are listed in the configuration."""

from __future__ import annotations

import pytest

from mot_megatron.config import Config
from mot_megatron.config_files import parse_config
from mot_megatron.errors import ConfigError
from mot_megatron.model.flops import step_flops
from mot_megatron.planning.placing import (
    check_experts_placed,
    check_placed,
    flops_of_towers,
    place_towers,
    tokens_of_towers,
)
from tests.small_runs import CONFIG

MP2 = "parallel.modality_parallel_size=2"


def config_of(*overrides: str) -> Config:
    settings = ["model.vocab_size=256", *overrides]
    return parse_config(CONFIG.format(corpus="none"), "small.toml", settings)


def test_tokens_of_a_tower_are_summed_over_its_modalities() -> None:
    model = config_of("model.modalities.speech.tower=text").model
    assert tokens_of_towers(model, {"speech": 1, "text": 10, "image": 100}) == (11, 100)


def test_flops_of_towers_exclude_attention() -> None:
    model = config_of().model
    flops = flops_of_towers(model, (30, 20, 0))
    assert flops[2] == 0
    assert flops[0] / flops[1] == pytest.approx(30 / 20)
    assert sum(flops) == pytest.approx(
        step_flops(model, (30, 20, 0), attended_pairs=0, labels=50).total
    )


def test_auto_placement_balances_flops_and_a_listed_placement_is_used() -> None:
    assert place_towers(config_of(), (5, 3, 2)) is None
    balanced = place_towers(config_of(MP2), (2, 3, 5))
    assert balanced is not None
    assert {balanced.towers(rank) for rank in (0, 1)} == {(2,), (0, 1)}
    listed = config_of(MP2, "parallel.placement=[{text=1.0,image=0.5},{image=0.5,speech=1.0}]")
    placement = place_towers(listed, (2, 3, 5))
    assert placement is not None
    assert placement.shares == ((1.0, 0.5, 0.0), (0.0, 0.5, 1.0))


@pytest.mark.parametrize(
    ("tower", "world_size", "ranks"),
    [
        ("text", 2, 1),  # the text tower is on one of two ranks
        ("text", 6, 3),  # the text tower is on one rank of each of three groups
        ("image", 6, None),  # the image tower is on all six
        ("image", 2, None),
        ("text", 4, None),
        ("speech", 4, None),
    ],
)
def test_experts_are_refused_on_ranks_that_cannot_share_them(
    tower: str, world_size: int, ranks: int | None
) -> None:
    config = config_of(
        MP2,
        "parallel.placement=[{text=1.0,image=0.5},{image=0.5,speech=1.0}]",
        f"model.towers.{tower}.experts={{num_moe_experts=4}}",
        "parallel.expert_model_parallel_size=2",
    )
    placement = place_towers(config, (1, 1, 1))
    if ranks is None:
        check_experts_placed(config, placement, world_size)
        return
    with pytest.raises(ConfigError) as caught:
        check_experts_placed(config, placement, world_size)
    assert str(caught.value) == (
        f"parallel.expert_model_parallel_size = 2 does not divide the {ranks} data-parallel ranks"
        f" that hold tower {tower}; nearest legal: 1"
    )


def test_a_middle_stage_needs_something_to_train() -> None:
    """With three stages, the rank of a frozen tower has nothing but that tower's layers."""
    stages = ["parallel.pipeline_model_parallel_size=3", "model.num_layers=3", MP2]
    frozen = "model.towers.image.frozen=true"
    tokens = (6, 12, 5)  # image alone on one of two ranks
    for overrides in ([], [frozen, "model.untied.qkv=false"]):
        config = config_of(*stages, *overrides)
        check_placed(config, place_towers(config, tokens), world_size=6)
    config = config_of(*stages, frozen)
    placement = place_towers(config, tokens)
    assert placement is not None
    assert (1,) in {placement.towers(rank) for rank in range(2)}
    with pytest.raises(ConfigError, match="ranks hold only image, frozen with"):
        check_placed(config, placement, world_size=6)
