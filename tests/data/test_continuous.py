"""Images as vectors in micro-batches: what sees what, what has a label, and how noise repeats."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from mot_megatron.config import Config
from mot_megatron.data.continuous import Image, intervals
from mot_megatron.data.corpus import Corpus
from mot_megatron.data.loader import DataShard, GroupingPlan, PackedLoader, evaluation_batches
from mot_megatron.data.noise import Noised
from mot_megatron.errors import DataError
from mot_megatron.model.micro_batch import NO_LABEL, LatentRows, MicroBatch
from mot_megatron.train.session import grouping_plan, resolve_config
from tests.model.visibility import Visibility
from tests.small_runs import small_config
from tests.vector_corpus import BEGIN, END, FLOW, PLACEHOLDER, write_vector_corpus

LENGTH = 64
DROPOUT = "model.modalities.image.objective.condition_dropout=0.5"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return Corpus.open(write_vector_corpus(tmp_path_factory.mktemp("vectors") / "corpus"))


def config_of(corpus: Corpus, *overrides: str) -> Config:
    return resolve_config(small_config(corpus.directory, [FLOW, *overrides]), corpus)


def loader(
    corpus: Corpus, *overrides: str, rank: int = 0, ranks: int = 1, size: int = 2
) -> PackedLoader:
    return PackedLoader(
        corpus,
        "train",
        seq_length=LENGTH,
        micro_batch_size=size,
        grouping=grouping_plan(config_of(corpus, *overrides)),
        shard=DataShard(rank, ranks),
        seed=1,
    )


def latents_of(batch: MicroBatch) -> LatentRows:
    (latents,) = batch.latents
    return latents


def same(one: LatentRows, other: LatentRows) -> bool:
    pairs = zip(dataclasses.astuple(one)[1:], dataclasses.astuple(other)[1:], strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_intervals_equal_an_explicit_mask() -> None:
    generator = np.random.default_rng(3)
    for seed in range(50):
        documents = np.cumsum(generator.random((2, 40)) < 0.1, axis=1)
        visibility = Visibility.random(documents, seed)
        images = []
        for row, numbers in enumerate(visibility.images):
            for number in np.unique(numbers[numbers >= 0]):
                (its,) = np.nonzero(numbers == number)
                content = Noised(np.zeros((len(its), 1)), np.zeros((len(its), 1)), 0.5)
                alone = bool(visibility.alone[row, its[0]])
                images.append(Image(1, row, int(its[0]), content, alone))
        for found, expected in zip(intervals(documents, images), visibility.intervals, strict=True):
            assert np.array_equal(found, expected)


def test_images_have_vectors_and_no_labels(corpus: Corpus) -> None:
    seen = 0
    reader = loader(corpus)
    for _ in range(5):
        batch = reader.next_micro_batch()
        latents = latents_of(batch)
        is_image = batch.token_ids == PLACEHOLDER
        assert torch.equal(latents.slots.sort().values, is_image.nonzero()[:, 0])
        ids = batch.token_ids[batch.ungroup_index].view(2, LENGTH)
        labels = batch.labels[batch.ungroup_index].view(2, LENGTH)
        assert (labels[ids == PLACEHOLDER] == NO_LABEL).all()
        assert (labels[:, :-1][ids[:, 1:] == PLACEHOLDER] == NO_LABEL).all()
        assert (labels[ids == BEGIN] == NO_LABEL).all()
        assert not ((labels == PLACEHOLDER) | (labels == END)).any()
        counts = torch.bincount(batch.label_modalities[batch.labels != NO_LABEL], minlength=3)
        counts[1] = len(latents.slots)
        assert tuple(counts.tolist()) == batch.modality_labels
        assert batch.num_token_labels == int((batch.labels != NO_LABEL).sum())
        seen += len(latents.slots)
    assert seen > 50


def test_vectors_are_those_of_the_documents(corpus: Corpus) -> None:
    """Data, from an input between data and noise and the velocity, are among the corpus's."""
    latents = latents_of(loader(corpus, size=4).next_micro_batch())
    clean = latents.inputs - latents.times[:, None] * latents.targets
    stored = torch.from_numpy(corpus.split("train").latents["image"].rows.astype(np.float32))
    distances = (clean[:, None] - stored).abs().amax(-1).amin(1)
    assert distances.max() < 1e-3


def test_noise_depends_on_the_place_in_the_stream_alone(corpus: Corpus) -> None:
    whole = latents_of(loader(corpus, DROPOUT, size=4).next_micro_batch())
    parts = [
        latents_of(loader(corpus, DROPOUT, rank=rank, ranks=2).next_micro_batch())
        for rank in range(2)
    ]
    for name in ("inputs", "targets", "times"):
        joined = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(joined, getattr(whole, name))
    resumed, reader = loader(corpus), loader(corpus)
    reader.next_micro_batch()
    resumed.load_state_dict(reader.state_dict())
    assert same(latents_of(resumed.next_micro_batch()), latents_of(reader.next_micro_batch()))


def test_epochs_have_other_noise(corpus: Corpus) -> None:
    reader, targets = loader(corpus), []
    while reader.state_dict()["epoch"] != 2:
        targets.append(latents_of(reader.next_micro_batch()).targets)
    assert len(torch.cat(targets).unique(dim=0)) == len(torch.cat(targets))


def test_an_image_that_something_follows_has_less_noise(corpus: Corpus) -> None:
    limited = loader(corpus, "model.modalities.image.objective.context_noise_limit=0.25")
    times = torch.cat([latents_of(limited.next_micro_batch()).times for _ in range(10)])
    free = torch.cat([latents_of(loader(corpus, size=20).next_micro_batch()).times])
    assert (times <= 0.25).any()
    assert (times > 0.25).any()  # last in their documents
    assert (times < 0.1).sum() / len(times) > (free < 0.1).sum() / len(free)


def test_evaluation_repeats_its_noise_and_drops_no_condition(corpus: Corpus) -> None:
    def batches() -> list[MicroBatch]:
        found = evaluation_batches(
            corpus,
            "validation",
            seq_length=LENGTH,
            micro_batch_size=2,
            grouping=grouping_plan(config_of(corpus, DROPOUT)),
            shard=DataShard(0, 1),
        )
        return list(found)

    for one, other in zip(batches(), batches(), strict=True):
        assert same(latents_of(one), latents_of(other))
        starts = one.positions.view(2, LENGTH)
        assert torch.equal(one.visible_from, torch.arange(LENGTH).int() - starts.int())
    times = torch.cat([latents_of(batch).times for batch in batches()])
    quartiles = torch.bincount((times * 4).long(), minlength=4)
    assert quartiles.min() > 0


def test_vectors_need_objectives(corpus: Corpus) -> None:
    with pytest.raises(DataError, match="modality image consists of vectors"):
        PackedLoader(
            corpus,
            "train",
            seq_length=LENGTH,
            micro_batch_size=1,
            grouping=GroupingPlan((0, 1, 2), 3),
            shard=DataShard(0, 1),
            seed=1,
        )


def test_budgets(corpus: Corpus) -> None:
    """Fillers of a tower of images are placeholders without vectors."""
    reader = PackedLoader(
        corpus,
        "train",
        seq_length=LENGTH,
        micro_batch_size=4,
        grouping=grouping_plan(config_of(corpus)),
        shard=DataShard(0, 1),
        seed=1,
        packing="budget",
    )
    batch = reader.next_micro_batch()
    assert batch.tower_tokens == reader.budgets
    assert len(latents_of(batch).slots) == batch.modality_tokens[1] <= batch.tower_tokens[1]
