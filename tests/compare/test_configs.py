"""configs/compare: every arm loads, has the dense model's FLOPs, and unties what its name says."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import pytest

from mot_megatron.config import Config
from mot_megatron.config_files import load_config
from mot_megatron.model.flops import active_flops_per_token, count_parameters, step_flops

COMPARE = Path(__file__).parents[2] / "configs" / "compare"
ARMS = sorted(
    path.stem for path in COMPARE.glob("*.toml") if path.stem not in ("base", "experiment")
)
# Proportions of the mixed corpus's train split; its documents have 75 tokens.
TOKENS = {"text": 35_669, "image": 32_353, "speech": 31_978}
PAIRS = sum(TOKENS.values()) * 38
VOCABULARY = "model.vocab_size=5632"


def load(arm: str) -> Config:
    return load_config([COMPARE / "base.toml", COMPARE / f"{arm}.toml"], [VOCABULARY])


def total_flops(config: Config) -> int:
    """Return the FLOPs of a step over TOKENS, each in its modality's tower."""
    model = config.model
    of_towers = dict.fromkeys(model.tower_names, 0)
    for name, modality in model.modalities.items():
        of_towers[modality.tower] += TOKENS[name]
    return step_flops(model, list(of_towers.values()), PAIRS, sum(of_towers.values())).total


@pytest.mark.parametrize("arm", ARMS)
def test_arm_is_named_after_its_file_and_differs_from_the_base_only_in_its_towers(
    arm: str,
) -> None:
    config, base = load(arm), load_config(COMPARE / "base.toml", [VOCABULARY])
    assert config.run.name == arm
    assert config.model_copy(update={"model": base.model, "run": base.run}) == base
    towers = ("modalities", "towers", "untied")
    assert config.model.model_dump(exclude=set(towers)) == base.model.model_dump(
        exclude=set(towers)
    )


def test_all_arms_have_equal_active_flops() -> None:
    dense = load("dense")
    table = [f"{'arm':26}{'towers':>7}{'parameters':>12}{'FLOPs per token':>17}{'to dense':>10}"]
    for arm in ARMS:
        config = load(arm)
        ratio = total_flops(config) / total_flops(dense)
        parameters = count_parameters(config.model).total
        per_token = total_flops(config) / sum(TOKENS.values())
        table.append(
            f"{arm:26}{config.model.num_towers:7}{parameters:12,}{per_token:17,.0f}{ratio:10.4f}"
        )
        assert ratio == pytest.approx(1, abs=0.01), arm
        # Per tower, without attention and head, which would hide a difference.
        (of_dense,) = active_flops_per_token(dense.model)
        for of_tower in active_flops_per_token(config.model):
            assert of_tower == pytest.approx(of_dense, rel=0.01), arm
    sys.stdout.write("\n" + "\n".join(table) + "\n")  # pytest -s shows it


def test_the_ladder_unties_one_component_per_rung() -> None:
    rungs = ["dense", "untied-feed-forward", "untied-qkv", "untied-output-projection", "mot"]
    counts = [count_parameters(load(arm).model).total for arm in rungs]
    h, d, f, layers, more_towers = 48, 12, 192, 4, 2
    # Three SwiGLU matrices; query, key and value; the output projection; then two norms per layer,
    # two per-head norms, and the final norm.
    sizes = [3 * h * f * layers, 3 * h * h * layers, h * h * layers, (2 * h + 2 * d) * layers + h]
    steps = [after - before for before, after in pairwise(counts)]
    assert steps == [more_towers * size for size in sizes]


@pytest.mark.parametrize(
    ("arm", "expected"),
    [
        ("dense", "all all all"),
        ("mot", "text image speech"),
        ("shared-text-image", "text text speech"),
        ("shared-text-speech", "text image text"),
        ("shared-image-speech", "text image image"),
    ],
)
def test_towers_of_text_image_and_speech(arm: str, expected: str) -> None:
    modalities = load(arm).model.modalities
    assert [modalities[name].tower for name in TOKENS] == expected.split()


def test_only_the_text_tower_of_the_hybrid_is_a_mixture() -> None:
    experts = load("mot-text-moe-4x").model.experts_of_towers
    assert [mixture.num_moe_experts if mixture else None for mixture in experts] == [4, None, None]
    (of_all,) = load("moe-4x").model.experts_of_towers
    assert of_all == experts[0]  # the hybrid's experts are the baseline's
    assert load("moe-4x").model.can_be_causal
