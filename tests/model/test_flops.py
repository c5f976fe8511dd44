"""Closed-form parameter and FLOP counts equal those of built models and of torch's counter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mot_megatron.config_files import load_config
from mot_megatron.config_model import UntiedConfig
from mot_megatron.model.flops import active_flops_per_token, count_parameters, step_flops
from mot_megatron.model.model import MixtureOfTransformers
from mot_megatron.model.sharding import SHARED, is_auxiliary
from mot_megatron.parallel.groups import build_single_process_groups
from tests.model.small_models import random_tokens, single_rank_model, small_config

THREE_TOWERS = {"text": "text", "image": "image", "speech": "speech"}
PAPER = Path(__file__).parents[2] / "configs" / "paper"


def elements(model: MixtureOfTransformers, tower: int) -> int:
    parameters = model.parameters()
    return sum(p.numel() for p in parameters if p.tower == tower)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "override",
    [f"model.untied.{flag}=false" for flag in UntiedConfig.model_fields]
    + [
        "model.qk_norm=false",
        "model.add_qkv_bias=true",
        "model.num_query_groups=2",
        "model.untie_embeddings_and_output_weights=false",
        "model.norm_placement=pre",
    ],
)
def test_parameter_counts_equal_a_built_model(override: str) -> None:
    for towers in (THREE_TOWERS, dict.fromkeys(THREE_TOWERS, "all")):
        config = small_config(towers, override)
        model, count = single_rank_model(config), count_parameters(config.model)
        assert count.shared == elements(model, SHARED)
        assert count.towers == tuple(elements(model, k) for k in range(config.model.num_towers))
        assert count.total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["37m-dense", "37m-mot-3"])
def test_parameter_counts_equal_a_built_paper_model(name: str) -> None:
    config = load_config(PAPER / f"{name}.toml")
    model = MixtureOfTransformers(config, build_single_process_groups(torch.device("cpu")))
    assert count_parameters(config.model).total == sum(p.numel() for p in model.parameters())


EXPERTS = "num_moe_experts=4,capacity_factor=1.25,causal_router=true"


def test_parameter_counts_of_towers_with_experts() -> None:
    """Towers differ in size, and causal routers are counted separately."""
    config = small_config(
        THREE_TOWERS,
        f"model.towers.image.experts={{{EXPERTS}}}",
        "model.towers.speech.experts={num_moe_experts=2,routing='topk',topk=2}",
    )
    model, count = single_rank_model(config), count_parameters(config.model)
    auxiliary = [p for p in model.parameters() if is_auxiliary(p)]
    # W1 [16, 32] and W2 [4, 16] in each of 2 layers
    assert count.causal_routers == sum(p.numel() for p in auxiliary) == 2 * (16 * 32 + 4 * 16)
    text, image, speech = (elements(model, k) for k in range(3))
    assert count.towers == (text, image - count.causal_routers, speech)
    assert count.stored == sum(p.numel() for p in model.parameters())
    assert count.total == count.stored - count.causal_routers


def test_parameter_counts_of_shared_experts_in_a_single_tower() -> None:
    towers = dict.fromkeys(THREE_TOWERS, "all")
    overrides = f"model.towers.all.experts={{{EXPERTS}}}", "model.untied.feed_forward=false"
    config = small_config(towers, *overrides)
    model, count = single_rank_model(config), count_parameters(config.model)
    assert count.towers == (elements(model, 0),)
    assert count.shared == elements(model, SHARED) - count.causal_routers


def test_frozen_towers_have_no_weight_gradients() -> None:
    """Shared components are trained, and count in full for the frozen tower's tokens too."""
    towers = {"text": "text", "image": "image"}
    config = small_config(towers, "model.towers.image.frozen=true", "model.untied.qkv=false")
    count = count_parameters(config.model)
    assert count.frozen == count.towers[1]
    shared, own = 2 * 2 * 3 * 32**2, 2 * 2 * (32**2 + 3 * 32 * 40)
    text, image = step_flops(config.model, (5, 7), 0, 0).towers
    assert text == 5 * 3 * (shared + own)
    assert image == 7 * (3 * shared + 2 * own)


def test_active_flops_per_token_with_and_without_experts() -> None:
    """With c experts per token, a mixture costs c plain networks plus its router."""
    towers = {"text": "text", "image": "image"}
    plain = active_flops_per_token(small_config(towers).model)
    # Two operations per weight, two layers: 4 * 32 * 32 in projections, 3 * 32 * 40 in the FFN.
    assert plain == (2 * 2 * (4 * 32**2 + 3 * 32 * 40),) * 2
    model = small_config(towers, f"model.towers.image.experts={{{EXPERTS}}}").model
    text, image = active_flops_per_token(model)
    assert text == plain[0]
    assert image == 2 * 2 * (4 * 32**2 + 1.25 * 3 * 32 * 40 + 4 * 32)
    assert step_flops(model, (5, 7), 0, 0).towers == (3 * 5 * text, 3 * 7 * image)


def plain_attention(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attend from every query to every key by plain matmuls, which torch counts on a CPU."""
    del layer
    k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", scores, v)


def grouped_mm_flops(a: list[int], b: list[int], *_: object, **__: object) -> int:
    """Count a grouped matmul, [r, p] x [e, p, q], or [p, r] x [r, q] for weights: 2 r p q."""
    return 2 * a[0] * a[1] * b[-1]


@pytest.mark.parametrize(
    "override",
    [
        "model.num_query_groups=2",
        "model.norm_placement=pre",
        # 24 image tokens and c = 1.5: each of two experts takes 18.
        "model.towers.image.experts={num_moe_experts=2,capacity_factor=1.5}",
        "model.towers.text.experts={num_moe_experts=4,routing='topk',topk=2}",
        "model.towers.text.frozen=true",
        "model.towers.image={frozen=true,experts={num_moe_experts=2,capacity_factor=1.5}}",
    ],
)
def test_step_flops_equal_torchs_counter(override: str) -> None:
    config = small_config(THREE_TOWERS, override)
    tokens = random_tokens(3, list(THREE_TOWERS), (1, 1, 1), shape=(2, 40))
    model, batch = single_rank_model(config), tokens.micro_batch(config)
    mapping = {torch.ops.aten._grouped_mm: grouped_mm_flops}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        model.logits(batch, attend=plain_attention).sum().backward()
    # Logits are computed for all 80 rows, with a label or without.
    expected = step_flops(config.model, batch.tower_tokens, 80 * 80, labels=80)
    assert expected.total == counter.get_total_flops()


def test_attended_pairs_are_counted_within_documents() -> None:
    config = small_config(THREE_TOWERS)
    tokens = random_tokens(4, list(THREE_TOWERS), (1, 1, 1))
    lengths = torch.unique_consecutive(tokens.documents, return_counts=True)[1].tolist()
    expected = sum(n * (n + 1) // 2 for n in lengths)
    assert tokens.micro_batch(config).attended_pairs == expected


def test_tower_flops_scale_with_the_towers_tokens() -> None:
    model = load_config(PAPER / "7b-mot-2.toml").model
    count = step_flops(model, (3, 1), 0, labels=4)
    assert count.towers[0] == 3 * count.towers[1]
    # 6 operations per weight of a tower's matrices: 32 * (4 * 4096^2 + 3 * 4096 * 11008)
    assert count.towers[1] == 6 * 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert count.head == 4 * 6 * 4096 * 65536
