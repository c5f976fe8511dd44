"""The estimate of host memory equals what building a model allocates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from mot_megatron.config_files import load_config
from mot_megatron.data.corpus import Corpus
from mot_megatron.model import initialization
from mot_megatron.model import model as model_module
from mot_megatron.model.inventory import held_parameters
from mot_megatron.model.model import MixtureOfTransformers
from mot_megatron.parallel.groups import build_single_process_groups
from mot_megatron.planning.host_memory import host_bytes
from mot_megatron.planning.layouts import plan
from mot_megatron.train.session import resolve_config
from tests.small_runs import CONFIG, small_config, write_corpus

EXPERTS = "model.towers.text.experts={num_moe_experts=4,causal_router=true}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_estimate_equals_the_memory_of_building_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    config = resolve_config(small_config(corpus, [EXPERTS]), Corpus.open(corpus))
    built: list[int] = []
    drawn: list[int] = []

    def initialize(model: nn.Module, *arguments: object) -> None:
        built.append(sum(p.numel() * p.element_size() for p in model.parameters()))
        initialization.initialize_parameters(model, *arguments)  # type: ignore[arg-type]

    draw = initialization.initial_values

    def initial_values(name: str, shape: Sequence[int], seed: int, std: float) -> torch.Tensor:
        values = draw(name, shape, seed, std)
        drawn.append(values.numel() * values.element_size())
        return values

    monkeypatch.setattr(model_module, "initialize_parameters", initialize)
    monkeypatch.setattr(initialization, "initial_values", initial_values)
    MixtureOfTransformers(config, build_single_process_groups(torch.device("cpu")), dtype)
    precision = "bf16" if dtype == torch.bfloat16 else "fp32"
    training = config.training.model_copy(update={"precision": precision})
    config = config.model_copy(update={"training": training})
    held = held_parameters(config, 0, range(config.model.num_towers))
    host = host_bytes(config, held, offloaded=0)
    assert host.start == built[0] + sum(sorted(drawn)[-initialization.DRAWN_AT_ONCE :])
    assert host.resume == 12 * sum(parameter.size for parameter in held)
    # Offload 12 bytes per parameter.
    offloaded = host_bytes(config, held, offloaded=host.resume)
    assert offloaded.start == host.resume
    assert offloaded.resume == 2 * host.resume


def test_every_tensor_parallel_rank_draws_whole_matrices(tmp_path: Path) -> None:
    path = tmp_path / "small.toml"
    path.write_text(CONFIG.format(corpus=tmp_path / "nowhere"))
    vocabulary = "model.vocab_size=1024"
    one, two = (
        plan(load_config(path, [vocabulary, *more]), 2, (1, 1, 1)).host
        for more in ([], ["parallel.tensor_model_parallel_size=2"])
    )
    # Drawn by every rank in fp32: the two vocabulary matrices, and six of SwiGLU's 12.
    whole = 4 * (2 * 1024 * 32 + 6 * 2 * 48 * 32)
    # Slightly above half, because norms (3 * 32 elements, 2 * 3 * 8 QK-norm elements per layer,
    # and so on) are not split.
    assert (one.start - whole) / 2 < two.start - whole < 0.52 * (one.start - whole)
    assert one.resume / 2 < two.resume < 0.52 * one.resume
