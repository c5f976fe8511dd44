"""Two tensor-parallel ranks, with and without sequence parallelism, equal one rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch

from mot_megatron.config import Config
from mot_megatron.model.model import MixtureOfTransformers
from mot_megatron.model.sharding import sharding_of
from mot_megatron.parallel.groups import ProcessGroups, build_process_groups
from tests.model.small_models import (
    Tokens,
    assert_all_close,
    assert_all_equal,
    cut,
    random_tokens,
    single_rank_model,
    small_config,
    take_gradients,
    vary_vectors,
)
from tests.ranks import run_ranks

THREE_TOWERS = {"text": "text", "image": "image", "speech": "speech"}
EVERYTHING_SHARED = [
    f"model.untied.{name}=false"
    for name in ("feed_forward", "qkv", "output_projection", "norms", "qk_norm", "final_norm")
]


@dataclass(frozen=True)
class Case:
    """A model and a batch; ``mix`` and ``shape`` are arguments of random_tokens."""

    overrides: tuple[str, ...] = ()
    mix: tuple[int, ...] = (1, 1, 1)
    shape: tuple[int, int] = (2, 24)

    def config(self, *parallel: str) -> Config:
        return small_config(THREE_TOWERS, *self.overrides, *parallel)

    def tokens(self) -> Tokens:
        return random_tokens(11, list(THREE_TOWERS), self.mix, self.shape)


CASES = {
    "post-norm": Case(),
    "odd counts of tokens": Case(shape=(1, 27)),
    "fewer tokens than ranks": Case(shape=(1, 3)),
    "absent modality": Case(mix=(1, 0, 2)),
    "single modality": Case(mix=(0, 1, 0), shape=(1, 5)),
    "pre-norm, grouped queries": Case(("model.norm_placement=pre", "model.num_query_groups=2")),
    "tied embedding": Case(("model.untie_embeddings_and_output_weights=false",)),
    "no qk-norm": Case(("model.qk_norm=false",)),
    "biases": Case(("model.add_qkv_bias=true", "model.num_query_groups=2")),
    "all shared": Case((*EVERYTHING_SHARED, "model.add_qkv_bias=true")),
    "full recompute": Case(("training.recompute=full",)),
    "selective recompute": Case(("training.recompute=selective",)),
    "loss weights": Case(
        ("model.z_loss_coefficient=0.01", "model.modalities.image.loss_weight=0.25")
    ),
}

LAYOUTS = {
    "TP 2": ("parallel.tensor_model_parallel_size=2",),
    "TP 2 + SP": ("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"),
}

Results = dict[str, torch.Tensor]


def results(model: MixtureOfTransformers, config: Config, case: Case) -> tuple[Results, Results]:
    """Return (losses, gradients) of the mean loss over labels."""
    batch = case.tokens().micro_batch(config)
    loss, sums = model(batch)
    loss = loss / max(1, sum(batch.modality_labels))
    loss.backward()
    return {"loss": loss.detach(), "sums": sums}, take_gradients(model)


def non_contiguous_results(
    model: MixtureOfTransformers, config: Config, case: Case
) -> tuple[Results, Results]:
    """Return the layers' gradients for a stream gradient that is not contiguous."""
    batch = case.tokens().micro_batch(config)
    stream = model.hidden_states(batch)
    generator = torch.Generator().manual_seed(5)
    columns = (
        torch.randn(config.model.hidden_size, 1, generator=generator) / batch.token_ids.numel()
    )
    torch.autograd.backward(stream, [columns.expand(-1, len(part)).T for part in stream])
    touched = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return {}, touched


Compute = Callable[[MixtureOfTransformers, Config, Case], tuple[Results, Results]]


@cache
def tensor_parallel_groups() -> ProcessGroups:
    return build_process_groups(2, torch.device("cpu"))


def on_this_rank(
    compute: Compute, cases: list[Case], layout: tuple[str, ...]
) -> list[tuple[Results, Results, Results]]:
    """Return (losses, gradients, initial weights) of every case."""
    of_cases = []
    for case in cases:
        config = case.config(*layout)
        model = MixtureOfTransformers(config, tensor_parallel_groups())
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        vary_vectors(model)
        of_cases.append((*compute(model, config, case), weights))
    return of_cases


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_losses_and_gradients_equal_one_rank(layout: tuple[str, ...]) -> None:
    of_ranks = run_ranks(on_this_rank, 2, results, list(CASES.values()), layout)
    for index, case in enumerate(CASES.values()):
        config = case.config()
        model = single_rank_model(config)
        losses, gradients = results(model, config, case)
        layouts = {name: sharding_of(p) for name, p in model.named_parameters()}
        for rank, of_cases in enumerate(of_ranks):
            actual_losses, actual_gradients, _ = of_cases[index]
            assert_all_close(actual_losses, losses, 1e-5)
            parts = {n: cut(g, layouts[n], rank, 2) for n, g in gradients.items()}
            assert_all_close(actual_gradients, parts, 1e-5)


def test_non_contiguous_gradients() -> None:
    case = Case(shape=(1, 26))
    config = case.config()
    model = single_rank_model(config)
    _, expected = non_contiguous_results(model, config, case)
    layouts = {name: sharding_of(p) for name, p in model.named_parameters()}
    of_ranks = run_ranks(on_this_rank, 2, non_contiguous_results, [case], LAYOUTS["TP 2"])
    for rank, ((_, actual, _),) in enumerate(of_ranks):
        parts = {n: cut(g, layouts[n], rank, 2) for n, g in expected.items()}
        assert_all_close(actual, parts, 1e-5)


def test_initial_weights_are_shards_of_the_same_model() -> None:
    case = Case(("model.num_query_groups=2",))
    expected = MixtureOfTransformers(case.config(), single_rank_model(case.config()).groups)
    of_ranks = run_ranks(on_this_rank, 2, results, [case], LAYOUTS["TP 2"])
    for rank, ((_, _, weights),) in enumerate(of_ranks):
        parts = {
            name: cut(p.detach(), sharding_of(p), rank, 2)
            for name, p in expected.named_parameters()
        }
        assert_all_equal(weights, parts)
