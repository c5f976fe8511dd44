"""The grouped model equals a literal Algorithm 1: hidden states, logits, loss, all gradients."""

from __future__ import annotations

import pytest
import torch

from mot_megatron.config import Config
from mot_megatron.config_model import UntiedConfig
from mot_megatron.model.micro_batch import MicroBatch
from mot_megatron.model.model import MixtureOfTransformers
from mot_megatron.parallel.groups import build_single_process_groups
from tests.model.algorithm_one import AlgorithmOne
from tests.model.small_models import (
    Tokens,
    assert_all_close,
    random_tokens,
    single_rank_model,
    small_config,
    take_gradients,
)

ONE_TOWER = {"text": "all", "image": "all", "speech": "all"}
TWO_TOWERS = {"text": "text", "image": "other", "speech": "other"}
THREE_TOWERS = {"text": "text", "image": "image", "speech": "speech"}
MIXES = {"even": (1, 1, 1), "no speech": (1, 2, 0), "only image": (0, 1, 0)}

SHAPES = {
    "post-norm": (),
    "pre-norm": ("model.norm_placement=pre",),
    "grouped queries": ("model.num_query_groups=2",),
    "one key-value head": ("model.num_query_groups=1", "model.norm_placement=pre"),
    "no qk-norm": ("model.qk_norm=false",),
    "biases": ("model.add_qkv_bias=true", "model.num_query_groups=2"),
    "tied embedding": ("model.untie_embeddings_and_output_weights=false",),
}


def grouped(rows: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    return rows[batch.group_index]


def model_results(
    model: MixtureOfTransformers, batch: MicroBatch, cotangent: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return hidden states, logits and the gradients of (logits * cotangent).sum(), by name."""
    hidden = torch.cat(model.hidden_states(batch))
    logits = model.logits(batch)
    logits.backward(cotangent)
    return {"hidden": hidden.detach(), "logits": logits.detach(), **take_gradients(model)}


def reference_results(
    model: MixtureOfTransformers, tokens: Tokens, batch: MicroBatch, cotangent: torch.Tensor
) -> dict[str, torch.Tensor]:
    hidden, logits = (grouped(rows, batch) for rows in AlgorithmOne(model).logits(tokens))
    logits.backward(cotangent)
    # A weight that no token uses has no gradient here, but a zero gradient in the model.
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return {"hidden": hidden.detach(), "logits": logits.detach(), **take_gradients(model)}


def compare(config: Config, tokens: Tokens, dtype: torch.dtype, tolerance: float) -> None:
    model, batch = single_rank_model(config, dtype), tokens.micro_batch(config)
    generator = torch.Generator().manual_seed(3)
    shape = (batch.token_ids.numel(), config.model.num_vocabulary_rows)
    cotangent = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    cotangent /= batch.token_ids.numel()
    actual = model_results(model, batch, cotangent)
    expected = reference_results(model, tokens, batch, cotangent)
    assert_all_close(actual, expected, tolerance)


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("towers", [ONE_TOWER, TWO_TOWERS, THREE_TOWERS], ids=["K1", "K2", "K3"])
def test_equals_algorithm_one_in_fp64(
    towers: dict[str, str], shape: tuple[str, ...], mix: tuple[int, ...]
) -> None:
    config = small_config(towers, *shape)
    compare(config, random_tokens(1, list(towers), mix), torch.float64, 1e-10)


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("flag", UntiedConfig.model_fields)
def test_equals_algorithm_one_with_a_shared_component(flag: str, biases: bool) -> None:
    untied = small_config(THREE_TOWERS, f"model.add_qkv_bias={str(biases).lower()}")
    shared = untied.model.untied.model_copy(update={flag: False})
    config = untied.model_copy(update={"model": untied.model.model_copy(update={"untied": shared})})
    assert len(list(single_rank_model(config).parameters())) < len(
        list(single_rank_model(untied).parameters())
    )
    compare(config, random_tokens(2, list(THREE_TOWERS), (2, 1, 1)), torch.float64, 1e-10)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("towers", [ONE_TOWER, TWO_TOWERS, THREE_TOWERS], ids=["K1", "K2", "K3"])
def test_equals_algorithm_one_in_fp32(towers: dict[str, str], seed: int) -> None:
    tokens = random_tokens(seed, list(towers), (1, 1, 1), shape=(1, 31))
    compare(small_config(towers), tokens, torch.float32, 1e-5)


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_loss_and_its_gradients_equal_algorithm_one(mix: tuple[int, ...]) -> None:
    config = small_config(
        THREE_TOWERS,
        "model.z_loss_coefficient=0.01",
        "model.modalities.image.loss_weight=0.25",
        "model.modalities.speech.loss_weight=3.0",
    )
    tokens = random_tokens(4, list(THREE_TOWERS), mix)
    model, batch = single_rank_model(config), tokens.micro_batch(config)
    labels = sum(batch.modality_labels)
    loss = model(batch)[0] / labels
    loss.backward()
    actual = {"loss": loss.detach(), **take_gradients(model)}
    expected_loss = AlgorithmOne(model).loss(tokens) / labels
    expected_loss.backward()
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    assert_all_close(actual, {"loss": expected_loss.detach(), **take_gradients(model)}, 1e-5)


def test_loss_sums_per_modality_are_plain_cross_entropy() -> None:
    config = small_config(THREE_TOWERS, "model.modalities.image.loss_weight=0.25")
    tokens = random_tokens(5, list(THREE_TOWERS), (1, 1, 1))
    model, batch = single_rank_model(config), tokens.micro_batch(config)
    _, sums = model(batch)
    each = torch.nn.functional.cross_entropy(
        model.logits(batch).detach(), batch.labels, reduction="none", ignore_index=-100
    )
    for modality in range(3):
        expected = each[batch.label_modalities == modality].sum()
        torch.testing.assert_close(sums[modality], expected.double(), rtol=1e-5, atol=1e-5)
    assert not sums.requires_grad


def test_documents_do_not_attend_to_each_other() -> None:
    config = small_config(THREE_TOWERS)
    packed = random_tokens(6, list(THREE_TOWERS), (1, 1, 1), shape=(2, 40))
    model = single_rank_model(config, torch.float64)
    batch = packed.micro_batch(config)
    in_sequence = model.logits(batch)[batch.ungroup_index]
    documents, ids = packed.documents, packed.token_ids.flatten()
    assert len(documents.unique()) > 4
    for document in documents.unique():
        rows = documents == document
        alone = Tokens(
            ids[rows.numpy()][None],
            torch.zeros(1, int(rows.sum()), dtype=torch.int32).numpy(),
            packed.modality_of_id,
        )
        batch = alone.micro_batch(config)
        torch.testing.assert_close(
            model.logits(batch)[batch.ungroup_index], in_sequence[rows], rtol=1e-10, atol=1e-10
        )


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_non_contiguous_gradients(recompute: str) -> None:
    config = small_config(THREE_TOWERS, f"training.recompute={recompute}")
    tokens = random_tokens(7, list(THREE_TOWERS), (1, 1, 1))
    model, batch = single_rank_model(config, torch.float64), tokens.micro_batch(config)
    generator = torch.Generator().manual_seed(8)
    results = []
    cotangents = [
        torch.randn(config.model.hidden_size, slots, generator=generator, dtype=torch.float64).T
        for slots in batch.tower_slots
    ]
    for given in (cotangents, [part.contiguous() for part in cotangents]):
        torch.autograd.backward(model.hidden_states(batch), given)
        # The head and the final norm come after the hidden states and have no gradient.
        touched = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        results.append(touched)
    assert not cotangents[0].is_contiguous()
    assert len(results[0]) > 20
    assert_all_close(results[0], results[1], 1e-10)


def test_biases_start_at_zero() -> None:
    config = small_config(TWO_TOWERS, "model.add_qkv_bias=true")
    groups = build_single_process_groups(torch.device("cpu"))
    model = MixtureOfTransformers(config, groups)
    biases = [p for name, p in model.named_parameters() if name.endswith(".bias")]
    assert len(biases) == config.model.num_towers * config.model.num_layers
    assert not any(bias.any() for bias in biases)
