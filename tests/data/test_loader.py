"""The stream of packed sequences: independent of the layout, resumable, each document once."""

from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mot_megatron.data.corpus import Corpus, TokenSplit
from mot_megatron.data.loader import DataShard, GroupingPlan, PackedLoader, evaluation_batches
from mot_megatron.data.packing import pack_epoch
from mot_megatron.errors import CheckpointError, DataError
from mot_megatron.model.micro_batch import NO_LABEL, MicroBatch

from .corpora import PAD_TOKEN, VOCAB_SIZE, random_documents, write_corpus

SEQ_LENGTH = 64
PLAN = GroupingPlan(towers_of_modalities=(0, 1, 1), num_towers=2)
DOCUMENTS = random_documents(120, 30)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    directory = tmp_path_factory.mktemp("corpora") / "corpus"
    return write_corpus(directory, train=DOCUMENTS, validation=DOCUMENTS[:50])


def loader(
    corpus: Corpus, rank: int = 0, size: int = 1, micro_batch_size: int = 4, seed: int = 1
) -> PackedLoader:
    return PackedLoader(
        corpus,
        "train",
        seq_length=SEQ_LENGTH,
        micro_batch_size=micro_batch_size,
        grouping=PLAN,
        shard=DataShard(rank, size),
        seed=seed,
    )


def sequences_of(batch: MicroBatch) -> list[list[int]]:
    """Return the token ids of each sequence, in sequence order."""
    ids = batch.token_ids[batch.ungroup_index]
    return ids.reshape(batch.visible_from.shape).tolist()


def documents_of(batch: MicroBatch) -> list[tuple[int, ...]]:
    """Return every run of positions that see the same begin, including unfilled tails."""
    found = []
    for ids, numbers in zip(sequences_of(batch), batch.visible_from.numpy(), strict=True):
        starts = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(ids)]
        found += [tuple(ids[a:b]) for a, b in pairwise(starts)]
    return found


def assert_equal_batches(one: MicroBatch, other: MicroBatch) -> None:
    for name, value in vars(one).items():
        if torch.is_tensor(value):
            assert torch.equal(value, getattr(other, name)), name
        else:
            assert value == getattr(other, name), name


def global_stream(
    corpus: Corpus, size: int, micro_batch_size: int, count: int, state: dict | None = None
) -> list[list[int]]:
    """Return the first ``count`` sequences that all ranks read together, in stream order."""
    loaders = [loader(corpus, rank, size, micro_batch_size) for rank in range(size)]
    if state is not None:
        for each in loaders:
            each.load_state_dict(state)
    found = []
    while len(found) < count:
        for each in loaders:
            found += sequences_of(each.next_micro_batch())
        assert all(each.state_dict() == loaders[0].state_dict() for each in loaders)
    return found[:count]


@pytest.mark.parametrize(("size", "micro_batch_size"), [(1, 1), (2, 4), (4, 2), (4, 3), (1, 200)])
def test_every_layout_reads_the_same_stream(
    corpus: Corpus, size: int, micro_batch_size: int
) -> None:
    # 120 documents of 15.5 tokens fill about 30 sequences: four epochs and several crossings.
    assert global_stream(corpus, size, micro_batch_size, 120) == global_stream(corpus, 1, 4, 120)


def test_epoch_contains_every_document_once(corpus: Corpus) -> None:
    lengths = corpus.split("train").lengths
    found = []
    reader = loader(corpus, micro_batch_size=1)
    for epoch in range(3):
        assert reader.state_dict()["epoch"] == epoch
        sequences = len(pack_epoch(lengths, SEQ_LENGTH, seed=1, epoch=epoch))
        batches = [reader.next_micro_batch() for _ in range(sequences)]
        tails = {tuple([PAD_TOKEN] * n) for n in range(1, SEQ_LENGTH)}
        found = [ids for batch in batches for ids in documents_of(batch) if ids not in tails]
        assert sorted(found) == sorted(tuple(ids.tolist()) for ids in DOCUMENTS)
    assert reader.state_dict()["next_sequence"] == 0


def test_epochs_and_seeds_differ(corpus: Corpus) -> None:
    first = global_stream(corpus, 1, 1, 120)
    assert len({tuple(ids) for ids in first}) > 100  # four epochs of about 30: hardly any repeats
    assert sequences_of(loader(corpus, seed=2).next_micro_batch()) != first[:4]


def test_unfilled_positions(corpus: Corpus) -> None:
    reader = loader(corpus, micro_batch_size=1)
    unfilled = 0
    for _ in range(30):
        batch = reader.next_micro_batch()
        end = sum(batch.modality_tokens)
        unfilled += SEQ_LENGTH - end
        ids, tail = sequences_of(batch)[0], batch.visible_from[0, end:]
        assert ids[end:] == [PAD_TOKEN] * (SEQ_LENGTH - end)
        assert (tail == end).all()
        assert batch.positions[end:].tolist() == list(range(SEQ_LENGTH - end))
        labels = batch.labels[batch.ungroup_index]
        assert (labels[max(end - 1, 0) :] == NO_LABEL).all()
    assert unfilled > 0  # otherwise the test would be vacuous


def test_labels_are_the_next_tokens(corpus: Corpus) -> None:
    batch = loader(corpus).next_micro_batch()
    labels = batch.labels[batch.ungroup_index].reshape(batch.visible_from.shape).tolist()
    numbers = batch.visible_from.tolist()
    counted = 0
    for row, ids in enumerate(sequences_of(batch)):
        for column, label in enumerate(labels[row]):
            if label != NO_LABEL:
                assert label == ids[column + 1]
                assert numbers[row][column] == numbers[row][column + 1]
                counted += 1
    assert counted == sum(batch.modality_labels) > 200
    label_modality = corpus.description.modality_of_id[batch.labels.clamp(min=0).numpy()]
    used = (batch.labels != NO_LABEL).numpy()
    assert np.array_equal(batch.label_modalities.numpy()[used], label_modality[used])


def test_fill_statistics_of_an_epoch(corpus: Corpus) -> None:
    split = corpus.split("train")
    sequences = len(pack_epoch(split.lengths, SEQ_LENGTH, seed=1, epoch=0))
    assert loader(corpus).fill == len(split.tokens) / (sequences * SEQ_LENGTH)
    assert 0.9 < loader(corpus).fill <= 1


@given(before=st.integers(0, 25), after=st.integers(1, 12))
def test_resumes_mid_epoch(corpus: Corpus, before: int, after: int) -> None:
    uninterrupted, interrupted, resumed = loader(corpus), loader(corpus), loader(corpus)
    for _ in range(before):
        uninterrupted.next_micro_batch()
        interrupted.next_micro_batch()
    resumed.next_micro_batch()  # loading a state discards this position
    resumed.load_state_dict(interrupted.state_dict())
    for _ in range(after):
        assert_equal_batches(resumed.next_micro_batch(), uninterrupted.next_micro_batch())
    assert resumed.state_dict() == uninterrupted.state_dict()


def test_resumes_with_another_size(corpus: Corpus) -> None:
    reader = loader(corpus, 1, 2, 3)
    for _ in range(7):  # 7 * 2 * 3 = 42 sequences, so in the second epoch
        reader.next_micro_batch()
    state = reader.state_dict()
    assert state["epoch"] == 1
    expected = global_stream(corpus, 1, 4, 100)[42:]
    for size, micro_batch_size in [(1, 1), (4, 5)]:
        found = global_stream(corpus, size, micro_batch_size, len(expected), state)
        assert found == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corpus": "0" * 64}, "saved with corpus = '0000"),
        ({"seed": 2}, "saved with seed = 2, but this run has 1"),
        ({"packing": "budget"}, "saved with packing = 'budget', but this run has 'sequence'"),
        ({"packing_version": 0}, "saved with packing_version = 0, but this run has 1"),
        ({"seq_length": 32}, "saved with seq_length = 32, but this run has 64"),
        ({"epoch": -1}, "epoch = -1, expected a count"),
        ({"next_sequence": "3"}, "next_sequence = '3', expected a count"),
        ({"next_sequence": 10_000}, r"next_sequence = 10000, expected 0\.\.\d+"),
        ({"extra": 1}, "has keys .*'extra'"),
    ],
)
def test_incompatible_state_is_rejected(corpus: Corpus, changes: dict, message: str) -> None:
    reader = loader(corpus)
    with pytest.raises(CheckpointError, match=message):
        reader.load_state_dict(reader.state_dict() | changes)


def test_rejected_state_leaves_the_loader_unchanged(corpus: Corpus) -> None:
    reader, untouched = loader(corpus), loader(corpus)
    state = reader.state_dict()
    with pytest.raises(CheckpointError):
        reader.load_state_dict(state | {"epoch": 3, "next_sequence": 10_000})
    assert_equal_batches(reader.next_micro_batch(), untouched.next_micro_batch())


def test_error_names_a_document_longer_than_the_sequence(tmp_path: Path) -> None:
    documents = [np.ones(64, int), np.ones(65, int)]
    corpus = write_corpus(tmp_path / "corpus", train=documents)
    message = r"corpus: split train: document 1 has 65 tokens, expected 1\.\.64 \(seq_length\)"
    with pytest.raises(DataError, match=message):
        loader(corpus)


def test_plan_with_other_modalities_is_rejected(corpus: Corpus) -> None:
    with pytest.raises(DataError, match=r"the corpus has 3 modalities .* maps 2 to towers"):
        evaluation_batches(
            corpus,
            "train",
            seq_length=SEQ_LENGTH,
            micro_batch_size=1,
            grouping=GroupingPlan((0, 1), 2),
            shard=DataShard(0, 1),
        )


def test_ids_are_checked_if_the_file_changes_after_opening(corpus: Corpus) -> None:
    split = corpus.split("train")
    tokens = split.tokens.copy()
    tokens[:] = VOCAB_SIZE
    changed = Corpus(
        corpus.directory,
        corpus.description,
        {"train": TokenSplit("train", tokens, split.offsets)},
        corpus.fingerprint,
    )
    with pytest.raises(DataError, match=r"token id 200, expected 0\.\.199"):
        loader(changed).next_micro_batch()


def evaluate(corpus: Corpus, rank: int, size: int, **options: int | None) -> list[MicroBatch]:
    batches = evaluation_batches(
        corpus,
        "validation",
        seq_length=SEQ_LENGTH,
        micro_batch_size=3,
        grouping=PLAN,
        shard=DataShard(rank, size),
        **options,
    )
    return list(islice(batches, 1000))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_evaluation_reads_each_document_once(corpus: Corpus, size: int) -> None:
    per_rank = [evaluate(corpus, rank, size) for rank in range(size)]
    assert len({len(batches) for batches in per_rank}) == 1
    everything = [batch for batches in per_rank for batch in batches]
    tails = {tuple([PAD_TOKEN] * n) for n in range(1, SEQ_LENGTH + 1)}
    found = [ids for batch in everything for ids in documents_of(batch) if ids not in tails]
    assert sorted(found) == sorted(tuple(ids.tolist()) for ids in DOCUMENTS[:50])
    # Each document has one label fewer than tokens; the loss over the split averages the labels.
    labels = sum(sum(batch.modality_labels) for batch in everything)
    assert labels == sum(len(ids) - 1 for ids in DOCUMENTS[:50])


def test_evaluation_is_repeatable(corpus: Corpus) -> None:
    for one, other in zip(evaluate(corpus, 1, 2), evaluate(corpus, 1, 2), strict=True):
        assert_equal_batches(one, other)


def test_evaluation_stops_at_the_limit(corpus: Corpus) -> None:
    full = [ids for batch in evaluate(corpus, 0, 1) for ids in sequences_of(batch)]
    limited = [evaluate(corpus, rank, 2, limit_sequences=4) for rank in range(2)]
    # Micro-batches of 3: rank 0 reads sequences 0, 1, 2, rank 1 sequence 3 and two empty ones.
    assert [len(batches) for batches in limited] == [1, 1]
    assert sequences_of(limited[0][0]) == full[:3]
    assert sequences_of(limited[1][0]) == [full[3], *[[PAD_TOKEN] * SEQ_LENGTH] * 2]
    labels = limited[1][0].labels[limited[1][0].ungroup_index].reshape(3, SEQ_LENGTH)
    assert (labels[1:] == NO_LABEL).all()
