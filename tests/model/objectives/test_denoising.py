"""A model of tokens and vectors equals a literal step: explicit mask, explicit losses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mot_megatron.config import Config
from mot_megatron.data.corpus import Corpus
from mot_megatron.data.loader import DataShard, PackedLoader
from mot_megatron.model.micro_batch import MicroBatch
from mot_megatron.model.model import MixtureOfTransformers
from mot_megatron.train.session import grouping_plan, resolve_config
from tests.model.algorithm_one import AlgorithmOne
from tests.model.small_models import (
    Tokens,
    assert_all_close,
    single_rank_model,
    take_gradients,
)
from tests.small_runs import small_config
from tests.vector_corpus import DIFFUSION, FLOW, PLACEHOLDER, WIDTH, write_vector_corpus

SEED, LENGTH, SEQUENCES, DROPOUT = 5, 64, 2, 0.5


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return Corpus.open(write_vector_corpus(tmp_path_factory.mktemp("vectors") / "corpus"))


def config_of(corpus: Corpus, *overrides: str) -> Config:
    dropout = f"model.modalities.image.objective.condition_dropout={DROPOUT}"
    settings = [dropout, "model.z_loss_coefficient=0.01", *overrides]
    return resolve_config(small_config(corpus.directory, settings), corpus)


def first_batch(corpus: Corpus, config: Config) -> MicroBatch:
    loader = PackedLoader(
        corpus,
        "train",
        seq_length=LENGTH,
        micro_batch_size=SEQUENCES,
        grouping=grouping_plan(config),
        shard=DataShard(0, 1),
        seed=SEED,
    )
    return loader.next_micro_batch()


class Literal(AlgorithmOne):
    """Algorithm 1 whose image rows are vectors with noise, which see all of their image."""

    def __init__(self, model: MixtureOfTransformers, batch: MicroBatch, tokens: Tokens) -> None:
        super().__init__(model)
        (self.latents,) = batch.latents
        # Vectors in the order of positions.
        places = batch.group_index[self.latents.slots]
        order = places.argsort()
        self.places = places[order]
        self.inputs, self.targets, self.times = (
            values[order]
            for values in (self.latents.inputs, self.latents.targets, self.latents.times)
        )
        self.image, self.alone = images_of(tokens)

    def embedded(self, tokens: torch.Tensor) -> torch.Tensor:
        weights = {
            name: self.weights[f"latent_entries.image.{name}"]
            for name in ("vector", "time_hidden", "time")
        }
        rows = tokens.clone()
        for place, vector, time in zip(self.places, self.inputs, self.times, strict=True):
            angles = [1000 * float(time) * 10_000 ** (-k / 64) for k in range(64)]
            waves = torch.tensor([*map(math.sin, angles), *map(math.cos, angles)])
            hidden = weights["time_hidden"] @ waves
            of_time = weights["time"] @ (hidden * torch.sigmoid(hidden))
            rows[place] = weights["vector"] @ vector + of_time
        return rows

    def visible(self, tokens: Tokens) -> torch.Tensor:
        seen = super().visible(tokens)
        for query in range(len(seen)):
            image = self.image[query]
            if image >= 0:
                its = self.image == image
                seen[query] = its if self.alone[query] else seen[query] | its
        return seen

    def loss(self, tokens: Tokens) -> torch.Tensor:
        stream, logits = self.logits(tokens)
        ids, documents = tokens.token_ids.flatten(), tokens.documents
        total = torch.zeros(())
        for place in range(len(ids) - 1):
            unknown = PLACEHOLDER in (ids[place], ids[place + 1])
            if unknown or documents[place] != documents[place + 1] or is_padding(tokens, place):
                continue
            label = ids[place + 1]
            weight = self.config.loss_weights[tokens.modality_of_id[label]]
            log_z = torch.logsumexp(logits[place], 0)
            total = total + weight * (log_z - logits[place, label] + 0.01 * log_z**2)
        rows = self.normed(stream, tokens)
        for place, target in zip(self.places, self.targets, strict=True):
            predicted = self.weights["latent_exits.image.vector"] @ rows[place]
            total = total + self.config.loss_weights[1] * (predicted - target).square().mean()
        return total


def is_padding(tokens: Tokens, place: int) -> bool:
    """Return whether a position is in the tail of its sequence, where only padding follows."""
    row, column = divmod(place, LENGTH)
    return not tokens.token_ids[row, column:].any()


def images_of(tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the image of every position, -1 for none, and whether it lacks its condition."""
    image, alone = torch.full((tokens.token_ids.size,), -1), torch.zeros(tokens.token_ids.size)
    for row, ids in enumerate(tokens.token_ids):
        segment, dropped = -1, False
        for column, token in enumerate(ids):
            if token != PLACEHOLDER:
                continue
            if column == 0 or ids[column - 1] != PLACEHOLDER:
                segment += 1
                dropped = np.random.default_rng([SEED, 0, row, segment]).random() < DROPOUT
            image[row * LENGTH + column] = 100 * row + segment
            alone[row * LENGTH + column] = dropped
    return image, alone.bool()


def tokens_of(batch: MicroBatch, corpus: Corpus) -> Tokens:
    ids = batch.token_ids[batch.ungroup_index].view(SEQUENCES, LENGTH).numpy()
    starts = batch.positions.view(SEQUENCES, LENGTH) == 0
    return Tokens(ids, starts.cumsum(1).int().numpy(), corpus.description.modality_of_id)


K1 = ("model.modalities.image.tower=text", "model.modalities.speech.tower=text")
K2 = ("model.modalities.speech.tower=text",)


@pytest.mark.parametrize("objective", [FLOW, DIFFUSION], ids=["flow matching", "diffusion"])
@pytest.mark.parametrize("towers", [K1, K2, ()], ids=["K1", "K2", "K3"])
def test_equals_a_literal_step(corpus: Corpus, towers: tuple[str, ...], objective: str) -> None:
    config = config_of(corpus, objective, *towers)
    batch = first_batch(corpus, config)
    model = single_rank_model(config)
    # They start as zeros, which would hide errors.
    for weight in model.latent_exits.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    tokens = tokens_of(batch, corpus)
    literal = Literal(model, batch, tokens)
    assert 0 < literal.alone.sum() < (literal.image >= 0).sum() == batch.modality_labels[1]
    labels = sum(batch.modality_labels)
    loss = model(batch)[0] / labels
    loss.backward()
    actual = {"loss": loss.detach(), **take_gradients(model)}
    expected_loss = literal.loss(tokens) / labels
    expected_loss.backward()
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    assert_all_close(actual, {"loss": expected_loss.detach(), **take_gradients(model)}, 1e-5)


def test_predictions_start_as_zeros(corpus: Corpus) -> None:
    config = config_of(corpus, FLOW)
    batch = first_batch(corpus, config)
    _, sums = single_rank_model(config)(batch)
    (latents,) = batch.latents
    assert latents.inputs.shape == (batch.modality_labels[1], WIDTH)
    assert sums[1].item() == pytest.approx(latents.targets.square().mean(-1).sum().item())
