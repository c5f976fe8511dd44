"""configs/paper agrees with the tables of the paper (section 3 and appendix)."""

from __future__ import annotations

from pathlib import Path

import pytest

from mot_megatron.config import Config
from mot_megatron.config_files import load_config
from mot_megatron.model.flops import count_parameters
from mot_megatron.rules import check_world_size

PAPER = Path(__file__).parents[1] / "configs" / "paper"

# size: dense parameters in millions, hidden size, layers, heads, batch per GPU, GPUs, tokens per
# batch in millions, thousands of steps
SIZES = {
    "37m": (37.0, 256, 4, 8, 12, 32, 1.57, 160),
    "94m": (94.4, 512, 8, 8, 8, 32, 1.05, 160),
    "443m": (442.5, 1024, 24, 16, 6, 64, 1.57, 160),
    "880m": (880.8, 1536, 24, 24, 4, 128, 2.10, 120),
    "1.5b": (1501.6, 2048, 24, 16, 4, 128, 2.10, 120),
    "7b": (7012.9, 4096, 32, 32, 2, 384, 3.15, 120),
}
TOWERS = {"dense": 1, "mot-2": 2, "mot-3": 3}


def load(size: str, kind: str) -> Config:
    return load_config(PAPER / f"{size}-{kind}.toml")


def test_there_is_a_file_for_every_size_and_kind() -> None:
    expected = {f"{size}-{kind}.toml" for size in SIZES for kind in TOWERS}
    assert {path.name for path in PAPER.glob("*.toml")} == expected


@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize("size", SIZES)
def test_shape_and_batch_equal_the_papers(size: str, kind: str) -> None:
    config = load(size, kind)
    _, hidden, layers, heads, batch, gpus, tokens, steps = SIZES[size]
    model, training = config.model, config.training
    assert (model.hidden_size, model.num_layers, model.num_attention_heads) == (
        hidden,
        layers,
        heads,
    )
    assert model.num_towers == TOWERS[kind]
    assert training.train_steps == steps * 1000
    assert training.micro_batch_size == batch
    assert training.global_batch_size == batch * gpus
    assert training.global_batch_size * config.data.seq_length == pytest.approx(
        tokens * 1e6, rel=0.005
    )
    check_world_size(config, gpus)
    assert config.accumulation_steps(gpus) == 1
    assert config.run.name == f"{size}-{kind}"


@pytest.mark.parametrize("size", SIZES)
def test_dense_parameter_counts_equal_the_papers(size: str) -> None:
    model = load(size, "dense").model
    # The table counts matrices only: not 2 norms and 2 QK-norms per layer, nor the final norm.
    norms = model.num_layers * 2 * (model.hidden_size + model.head_dim) + model.hidden_size
    millions = (count_parameters(model).total - norms) / 1e6
    assert round(millions, 1) == SIZES[size][0]


def test_total_parameters_at_7b() -> None:
    billions = [round(count_parameters(load("7b", kind).model).total / 1e9, 2) for kind in TOWERS]
    assert billions == [7.01, 13.49, 19.97]


@pytest.mark.parametrize("size", SIZES)
def test_each_tower_adds_the_untied_parameters(size: str) -> None:
    dense, two, three = (count_parameters(load(size, kind).model) for kind in TOWERS)
    assert dense.shared == two.shared == three.shared == 2 * 65536 * SIZES[size][1]
    assert three.total - two.total == two.total - dense.total == dense.towers[0]


@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize("size", SIZES)
def test_training_settings_equal_the_papers(size: str, kind: str) -> None:
    config = load(size, kind)
    model, optimizer = config.model, config.optimizer
    assert model.norm_placement == "post"
    assert model.qk_norm
    assert model.z_loss_coefficient == 1e-5
    assert model.untie_embeddings_and_output_weights
    assert all(model.untied.model_dump().values())
    assert (optimizer.adam_beta1, optimizer.adam_beta2, optimizer.adam_eps) == (0.9, 0.95, 1e-5)
    assert (optimizer.weight_decay, optimizer.clip_grad) == (0.1, 1.0)
    assert optimizer.lr_warmup_steps == 4000
    assert config.training.precision == "bf16"
