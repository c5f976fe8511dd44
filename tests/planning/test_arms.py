"""The models that a Mixture-of-Transformers is compared with."""

from __future__ import annotations

import pytest

from mot_megatron.config_files import for_world_size
from mot_megatron.errors import ConfigError
from mot_megatron.model.flops import step_flops
from mot_megatron.planning.arms import HYBRID, MIXTURE, MODEL, TWIN, arms_of
from mot_megatron.rules import check
from tests.model.small_models import small_config

TOWERS = {"text": "text", "image": "image"}
LAYOUT = ["parallel.modality_parallel_size=2", "parallel.attention_exchange=heads"]


def test_all_arms_have_equal_flops_and_their_own_weights() -> None:
    arms = arms_of(small_config(TOWERS, *LAYOUT), "dense,moe-4x,hybrid")
    assert list(arms) == [MODEL, TWIN, MIXTURE, HYBRID]
    for arm, config in arms.items():
        check(config, arm)
    flops = [
        sum(
            step_flops(
                each.model, [60 // each.model.num_towers] * each.model.num_towers, 99, 60
            ).towers
        )
        for each in arms.values()
    ]
    assert flops[1] == flops[0]
    # Routers cost little, even next to a hidden size of 32.
    assert flops == pytest.approx([flops[0]] * 4, rel=0.02)
    experts = [each.model.experts_of_towers for each in arms.values()]
    assert [[one is not None for one in each] for each in experts] == [
        [False, False],
        [False],
        [True],
        [True, False],
    ]
    sizes = [each.parallel.modality_parallel_size for each in arms.values()]
    assert sizes == [2, 1, 1, 2]


def test_arms_that_cannot_be_made_are_one_line() -> None:
    config = small_config({"image": "image"})
    with pytest.raises(ConfigError, match="no arm 'moe'; allowed: dense, moe-4x, hybrid"):
        arms_of(config, "dense,moe")
    with pytest.raises(ConfigError, match="the modalities are image"):
        arms_of(config, "hybrid")
    experts = "model.towers.text.experts={num_moe_experts=4}"
    with pytest.raises(ConfigError, match=r"towers\.text\.experts: the model is a hybrid already"):
        arms_of(small_config(TOWERS, experts), "hybrid")


def test_a_layout_may_depend_on_the_number_of_ranks() -> None:
    changes = "{parallel={zero_stage=3}, training={recompute='full', micro_batch_size=1}}"
    config = small_config(TOWERS, f"scaling.layouts.8={changes}")
    assert for_world_size(config, 4) is config
    changed = for_world_size(config, 8)
    assert (changed.parallel.zero_stage, changed.training.recompute) == (3, "full")
    assert changed.model == config.model
    bad = small_config(TOWERS, "scaling.layouts.8={parallel={pipeline_model_parallel_size=3}}")
    with pytest.raises(ConfigError, match=r"scaling\.layouts\.8"):
        for_world_size(bad, 8)
