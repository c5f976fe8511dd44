"""Untying: one tower or equal towers give the dense model; towers meet only in attention."""

from __future__ import annotations

from itertools import pairwise

import hypothesis
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from mot_megatron.config import Config
from mot_megatron.model.model import MixtureOfTransformers
from mot_megatron.model.sharding import SHARED
from tests.model.algorithm_one import positions_of
from tests.model.small_models import (
    Tokens,
    assert_all_close,
    assert_all_equal,
    modality_of_id,
    random_tokens,
    single_rank_model,
    small_config,
    take_gradients,
)

NAMES = ["text", "image", "speech"]
THREE_TOWERS = {name: name for name in NAMES}
ONE_TOWER = dict.fromkeys(NAMES, "all")


def loss_and_gradients(model: MixtureOfTransformers, config: Config, tokens: Tokens) -> dict:
    batch = tokens.micro_batch(config)
    logits = model.logits(batch).detach()[batch.ungroup_index]
    loss = model(batch)[0] / batch.token_ids.numel()
    loss.backward()
    return {"logits": logits, "loss": loss.detach(), **take_gradients(model)}


def test_three_modalities_in_one_tower_equal_one_modality_bitwise() -> None:
    tokens = random_tokens(1, NAMES, (1, 1, 1))
    mixed = small_config(ONE_TOWER)
    plain = small_config({"text": "dense"})
    one_modality = Tokens(
        tokens.token_ids, tokens.document_ids, np.zeros_like(tokens.modality_of_id)
    )
    assert_all_equal(
        loss_and_gradients(single_rank_model(mixed), mixed, tokens),
        loss_and_gradients(single_rank_model(plain), plain, one_modality),
    )


def dense_logits(model: MixtureOfTransformers, tokens: Tokens) -> torch.Tensor:
    """Run an ordinary dense transformer built from plain torch functions, in sequence order."""
    weights, config = dict(model.named_parameters()), model.config
    h, d, heads = config.hidden_size, config.head_dim, config.num_attention_heads
    positions = positions_of(tokens)[:, None].float()
    angles = positions * config.rotary_base ** -(torch.arange(0, d, 2).float() / d)
    angles = torch.cat((angles, angles), dim=-1)[:, None]

    def rotated(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * angles.cos() + torch.cat((-second, first), dim=-1) * angles.sin()

    def weight(name: str) -> torch.Tensor:
        return weights[f"{name}.weight"]

    lengths = torch.unique_consecutive(tokens.documents, return_counts=True)[1].tolist()
    x = F.embedding(torch.from_numpy(tokens.token_ids).flatten(), weight("embedding.lookup"))
    for index in range(config.num_layers):
        attention = f"layers.{index}.attention"
        qkv = F.linear(x, weight(f"{attention}.qkv.towers.0.linear")).view(-1, heads, 3, d)
        q, k, v = qkv.unbind(2)
        q = rotated(F.rms_norm(q, (d,), weight(f"{attention}.q_norm.towers.0"), config.norm_eps))
        k = rotated(F.rms_norm(k, (d,), weight(f"{attention}.k_norm.towers.0"), config.norm_eps))
        parts = zip(*(part.split(lengths) for part in (q, k, v)), strict=True)
        mixed = [
            F.scaled_dot_product_attention(
                *(part.transpose(0, 1)[None] for part in document), is_causal=True
            )[0].transpose(0, 1)
            for document in parts
        ]
        out = weight(f"{attention}.output_projection.towers.0.linear")
        update = F.linear(torch.cat(mixed).flatten(1), out)
        norm = weight(f"layers.{index}.attention_norm.towers.0")
        x = x + F.rms_norm(update, (h,), norm, config.norm_eps)
        feed_forward = f"layers.{index}.feed_forward.towers.0"
        gate, up = F.linear(x, weight(f"{feed_forward}.gate_up.linear")).chunk(2, dim=-1)
        update = F.linear(F.silu(gate) * up, weight(f"{feed_forward}.down.linear"))
        norm = weight(f"layers.{index}.feed_forward_norm.towers.0")
        x = x + F.rms_norm(update, (h,), norm, config.norm_eps)
    x = F.rms_norm(x, (h,), weight("final_norm.towers.0"), config.norm_eps)
    return F.linear(x, weight("head.linear"))


def test_one_tower_equals_an_ordinary_dense_transformer_bitwise() -> None:
    tokens, config = random_tokens(2, NAMES, (1, 1, 1)), small_config(ONE_TOWER)
    model, batch = single_rank_model(config), tokens.micro_batch(config)
    cotangent = torch.randn(
        batch.token_ids.numel(), 128, generator=torch.Generator().manual_seed(0)
    )
    results = []
    for logits in (model.logits(batch), dense_logits(model, tokens)):
        logits.backward(cotangent)
        results.append({"logits": logits.detach(), **take_gradients(model)})
    assert_all_equal(*results)


@pytest.mark.parametrize("seed", range(3))
def test_towers_with_equal_weights_equal_dense(seed: int) -> None:
    tokens = random_tokens(seed, NAMES, (1, 2, 1))
    config, dense_config = small_config(THREE_TOWERS), small_config(ONE_TOWER)
    model, dense = single_rank_model(config), single_rank_model(dense_config)
    of_dense = dict(dense.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(of_dense[_as_tower_0(name)])
    expected = loss_and_gradients(dense, dense_config, tokens)
    actual = loss_and_gradients(model, config, tokens)
    # A shared weight's gradient is the sum of its copies' gradients.
    summed: dict[str, torch.Tensor] = {}
    for name, value in actual.items():
        summed[_as_tower_0(name)] = summed.get(_as_tower_0(name), 0) + value
    assert_all_close(summed, expected, 1e-6)


def _as_tower_0(name: str) -> str:
    return name.replace("towers.1.", "towers.0.").replace("towers.2.", "towers.0.")


@st.composite
def documents(draw: st.DrawFn) -> tuple[Tokens, list[set[int]]]:
    """Draw one packed sequence and the set of modalities of each of its documents."""
    of_documents = draw(
        st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=6)
    )
    if not any(len(set(document)) == 1 for document in of_documents):
        of_documents.append([draw(st.integers(0, 2))])
    modalities = np.concatenate([np.asarray(document) for document in of_documents])
    starts = np.array([0, 40, 100])  # first id of text, image, speech
    ids = starts[modalities] + np.arange(len(modalities)) % 28
    document_ids = np.repeat(np.arange(len(of_documents)), [len(d) for d in of_documents])
    tokens = Tokens(ids[None], document_ids[None].astype(np.int32), modality_of_id(NAMES))
    return tokens, [set(document) for document in of_documents]


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(documents())
def test_single_tower_documents_give_no_gradient_to_other_towers(
    case: tuple[Tokens, list[set[int]]],
) -> None:
    tokens, contents = case
    config = small_config(THREE_TOWERS)
    model, batch = single_rank_model(config), tokens.micro_batch(config)
    document_of_slot = tokens.documents[batch.group_index]
    for tower in range(3):
        of_tower = [d for d, modalities in enumerate(contents) if modalities == {tower}]
        rows = torch.isin(document_of_slot, torch.tensor(of_tower, dtype=torch.int64))
        model.logits(batch)[rows].square().sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            owner = parameter.tower  # type: ignore[attr-defined]
            touched = bool(parameter.grad.any())
            if owner not in (tower, SHARED) or not of_tower:
                assert not touched, f"{name} is touched by tower {tower}"
            elif "attention.q_norm" not in name and "attention.k_norm" not in name:
                # In a document of one token, attention does not depend on queries and keys.
                assert touched, f"{name} is untouched by tower {tower}"
        model.zero_grad(set_to_none=True)


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(documents(), st.integers(0, 2))
def test_outside_attention_a_token_gives_gradients_only_to_its_tower(
    case: tuple[Tokens, list[set[int]]], tower: int
) -> None:
    tokens = case[0]
    # With a single layer, other towers affect a token only through their keys and values.
    config = small_config(THREE_TOWERS, "model.num_layers=1")
    model, batch = single_rank_model(config), tokens.micro_batch(config)
    rows = tokens.modalities[batch.group_index] == tower
    model.logits(batch)[rows].square().sum().backward()
    for name, parameter in model.named_parameters():
        owner = parameter.tower  # type: ignore[attr-defined]
        if owner in (tower, SHARED) or "attention.k_norm" in name:
            continue
        assert parameter.grad is not None
        gradient = parameter.grad
        if "attention.qkv" in name:
            gradient = gradient.view(4, 3, 8, 32)[:, 0]  # 4 groups of (query, key, value) rows
        assert not gradient.any(), f"{name} is touched by tower {tower}"


def test_tokens_give_gradients_to_keys_and_values_of_other_towers() -> None:
    config = small_config(THREE_TOWERS, "model.num_layers=1")
    ids = np.array([[0, 40, 41]])  # text, image, image: one document
    tokens = Tokens(ids, np.zeros((1, 3), dtype=np.int32), modality_of_id(NAMES))
    model, batch = single_rank_model(config), tokens.micro_batch(config)
    model.logits(batch)[1:].square().sum().backward()
    gradient = dict(model.named_parameters())["layers.0.attention.qkv.towers.0.linear.weight"].grad
    assert gradient is not None
    query, key, value = gradient.view(4, 3, 8, 32).unbind(1)
    assert not query.any()
    assert key.any()
    assert value.any()


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_gives_bitwise_equal_results(recompute: str) -> None:
    tokens, results = random_tokens(9, NAMES, (1, 1, 0)), []
    for setting in ("none", recompute):
        config = small_config(THREE_TOWERS, f"training.recompute={setting}")
        results.append(loss_and_gradients(single_rank_model(config), config, tokens))
    assert_all_equal(*results)


def test_every_parameter_is_tagged_with_its_tower() -> None:
    config = small_config(THREE_TOWERS, "model.untied.qkv=false")
    counts = {SHARED: 0, 0: 0, 1: 0, 2: 0}
    for name, parameter in single_rank_model(config).named_parameters():
        tower = parameter.tower  # type: ignore[attr-defined]
        counts[tower] += 1
        assert (f".towers.{tower}." in f".{name}") == (tower != SHARED)
    # Shared: embedding, head and 2 QKV. Per tower: a final norm and 2 layers, each with 2 QK-norms,
    # an output projection, 2 SwiGLU matrices and 2 norms.
    assert counts == {SHARED: 4, 0: 15, 1: 15, 2: 15}


def test_initial_weights_depend_only_on_seed_and_name() -> None:
    three, two = small_config(THREE_TOWERS), small_config({"text": "a", "image": "b"})
    of_three, of_two = (dict(single_rank_model(c).named_parameters()) for c in (three, two))
    assert of_two.keys() < of_three.keys()
    assert_all_equal({name: of_three[name] for name in of_two}, of_two)
    other = single_rank_model(small_config(THREE_TOWERS, "run.seed=5"))
    matrices = {n: p for n, p in other.named_parameters() if p.ndim > 1}
    assert not any(torch.equal(of_three[name], value) for name, value in matrices.items())
    for a, b in pairwise(matrices.values()):
        assert a.shape != b.shape or not torch.equal(a, b)
    for value in matrices.values():
        # The sample standard deviation of 32 x 32 values has a standard error of 2.2%.
        assert value.std().item() == pytest.approx(0.2, rel=0.1)
