"""Closed-form parameters and operations against built models and torch's own counter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mot_megatron.config import UntiedConfig, load_config
from mot_megatron.model.flops import count_parameters, step_flops
from mot_megatron.model.model import MixtureOfTransformers
from mot_megatron.model.sharding import SHARED
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
        "model.num_query_groups=2",
        "model.untie_embeddings_and_output_weights=false",
        "model.norm_placement=pre",
    ],
)
def test_parameters_of_a_built_model(override: str) -> None:
    for towers in (THREE_TOWERS, dict.fromkeys(THREE_TOWERS, "all")):
        config = small_config(towers, override)
        model, count = single_rank_model(config), count_parameters(config.model)
        assert count.shared == elements(model, SHARED)
        assert count.towers == tuple(elements(model, k) for k in range(config.model.num_towers))
        assert count.total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["37m-dense", "37m-mot-3"])
def test_parameters_of_a_built_paper_model(name: str) -> None:
    config = load_config(PAPER / f"{name}.toml")
    model = MixtureOfTransformers(config, build_single_process_groups(torch.device("cpu")))
    assert count_parameters(config.model).total == sum(p.numel() for p in model.parameters())


def plain_attention(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Every query on every key by plain products, which torch's counter sees on a CPU."""
    del layer
    k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", scores, v)


@pytest.mark.parametrize("override", ["model.num_query_groups=2", "model.norm_placement=pre"])
def test_operations_equal_torchs_count(override: str) -> None:
    config = small_config(THREE_TOWERS, override)
    tokens = random_tokens(3, list(THREE_TOWERS), (1, 1, 1), shape=(2, 40))
    model, batch = single_rank_model(config), tokens.micro_batch(config)
    with FlopCounterMode(display=False) as counter:
        model.logits(batch, attend=plain_attention).sum().backward()
    assert step_flops(config.model, batch.tower_tokens, 80 * 80).total == counter.get_total_flops()


def test_attended_pairs_of_documents() -> None:
    config = small_config(THREE_TOWERS)
    tokens = random_tokens(4, list(THREE_TOWERS), (1, 1, 1))
    lengths = torch.unique_consecutive(tokens.documents, return_counts=True)[1].tolist()
    expected = sum(n * (n + 1) // 2 for n in lengths)
    assert tokens.micro_batch(config).attended_pairs == expected


def test_towers_pay_for_their_own_tokens() -> None:
    model = load_config(PAPER / "7b-mot-2.toml").model
    count = step_flops(model, (3, 1), 0)
    assert count.towers[0] == 3 * count.towers[1]
    # 6 operations per weight of a tower's matrices: 32 * (4 * 4096^2 + 3 * 4096 * 11008)
    assert count.towers[1] == 6 * 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert count.head == 4 * 6 * 4096 * 65536
