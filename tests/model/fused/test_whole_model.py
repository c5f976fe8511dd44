"""A model with fused operations has the losses and gradients of plain PyTorch.

Triton interprets the kernels, so the batches are small.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from mot_megatron.config import Config
from mot_megatron.errors import ConfigError
from mot_megatron.model.fused import qkv
from mot_megatron.model.layer import Attention
from mot_megatron.model.model import MixtureOfTransformers
from mot_megatron.model.operations import PLAIN, check_backend, layer_operations
from mot_megatron.model.sharding import sharding_of
from mot_megatron.parallel.groups import ProcessGroups, build_process_groups
from tests.model.small_models import (
    assert_all_close,
    cut,
    random_tokens,
    single_rank_model,
    small_config,
    take_gradients,
    vary_vectors,
)
from tests.ranks import run_ranks

TRITON = "model.layer_backend=triton"
THREE_TOWERS = {"text": "text", "image": "image", "speech": "speech"}
ONE_LAYER = "model.num_layers=1"
CASES = {
    "post-norm, two layers": (),
    "pre-norm, grouped queries, two layers": (
        "model.norm_placement=pre",
        "model.num_query_groups=2",
    ),
    "no qk-norm": (ONE_LAYER, "model.qk_norm=false"),
    "biases": (ONE_LAYER, "model.add_qkv_bias=true"),
    "shared components": (
        ONE_LAYER,
        *(f"model.untied.{name}=false" for name in ("qkv", "norms", "qk_norm", "feed_forward")),
    ),
    "full recompute": (ONE_LAYER, "training.recompute=full"),
    "selective recompute": (ONE_LAYER, "training.recompute=selective"),
    "experts": (
        ONE_LAYER,
        "model.towers.image.experts={num_moe_experts=2}",
        "model.norm_placement=pre",
    ),
}
Results = dict[str, torch.Tensor]


def results(model: MixtureOfTransformers, config: Config, mix: tuple[int, ...]) -> Results:
    """Return losses and all gradients of the mean loss over labels."""
    batch = random_tokens(11, list(THREE_TOWERS), mix, (1, 13)).micro_batch(config)
    loss, sums = model(batch)
    loss = loss / sum(batch.modality_labels)
    loss.backward()
    return {"loss": loss.detach(), "sums": sums, **take_gradients(model)}


@pytest.mark.parametrize("overrides", CASES.values(), ids=CASES)
def test_equals_plain_pytorch(overrides: tuple[str, ...]) -> None:
    # The third modality is absent; sums in another order differ by about 1e-6.
    both = []
    for backend in ("model.layer_backend=torch", TRITON):
        config = small_config(THREE_TOWERS, *overrides, backend)
        both.append(results(single_rank_model(config), config, (2, 1, 0)))
    assert_all_close(both[1], both[0], 1e-5)


def test_one_tower_equals_plain_pytorch() -> None:
    both = []
    for backend in ("model.layer_backend=torch", TRITON):
        config = small_config(dict.fromkeys(THREE_TOWERS, "all"), backend)
        both.append(results(single_rank_model(config), config, (1, 1, 1)))
    assert_all_close(both[1], both[0], 1e-5)


def test_bf16_is_as_near_to_fp32_as_plain_pytorch() -> None:
    """Fused operations round less often; the interpreter's roundings cost up to twice a GPU's."""
    losses = {}
    for backend in ("torch", "triton"):
        config = small_config(THREE_TOWERS, f"model.layer_backend={backend}")
        for dtype in (torch.float32, torch.bfloat16):
            model = single_rank_model(config, dtype)
            losses[backend, dtype] = float(results(model, config, (1, 1, 1))["loss"])
    exact = losses["torch", torch.float32]
    assert abs(losses["triton", torch.bfloat16] - exact) < 2**-7 * exact
    assert abs(losses["torch", torch.bfloat16] - exact) < 2**-7 * exact


@cache
def two_ranks() -> ProcessGroups:
    return build_process_groups(2, torch.device("cpu"))


def on_this_rank(overrides: tuple[str, ...]) -> Results:
    config = small_config(THREE_TOWERS, TRITON, *overrides)
    model = MixtureOfTransformers(config, two_ranks())
    vary_vectors(model)
    return results(model, config, (2, 1, 0))


@pytest.mark.slow
@pytest.mark.parametrize("sequence_parallel", ["true", "false"])
def test_tensor_parallel_ranks_equal_one_rank_of_plain_pytorch(sequence_parallel: str) -> None:
    overrides = ("model.norm_placement=pre", "model.num_query_groups=2")
    layout = (
        "parallel.tensor_model_parallel_size=2",
        f"parallel.sequence_parallel={sequence_parallel}",
    )
    of_ranks = run_ranks(on_this_rank, 2, (*overrides, *layout))
    config = small_config(THREE_TOWERS, *overrides)
    model = single_rank_model(config)
    expected = results(model, config, (2, 1, 0))
    shardings = {name: sharding_of(p) for name, p in model.named_parameters()}
    for rank, actual in enumerate(of_ranks):
        of_rank = {
            name: cut(value, shardings[name], rank, 2) if name in shardings else value
            for name, value in expected.items()
        }
        assert_all_close(actual, of_rank, 1e-5)


def test_names_of_parameters_do_not_depend_on_the_backend() -> None:
    names = [
        [
            name
            for name, _ in single_rank_model(small_config(THREE_TOWERS, *more)).named_parameters()
        ]
        for more in ((), (TRITON,))
    ]
    assert names[0] == names[1]


def test_auto_is_plain_pytorch_on_a_cpu() -> None:
    assert layer_operations("auto", on_gpus=False) is PLAIN
    fused = layer_operations("auto", on_gpus=True)
    assert fused.rotated_heads is qkv.rotated_heads
    model = single_rank_model(small_config(THREE_TOWERS, TRITON))
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    assert [module.operations.rotated_heads for module in attentions] == [qkv.rotated_heads] * 2


def test_triton_needs_a_gpu_or_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    check_backend("triton", on_gpus=False)
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    with pytest.raises(ConfigError, match=r'layer_backend = "triton" needs a GPU.*allowed here'):
        check_backend("triton", on_gpus=False)
    check_backend("triton", on_gpus=True)
