"""Tokens that are context only: stored beside the tokens, checked, and never a label."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mot_megatron.cli.inspect import print_report
from mot_megatron.data.blend import Blend
from mot_megatron.data.corpus import Corpus, LongDocuments
from mot_megatron.data.inspection import inspect
from mot_megatron.data.loader import DataShard, GroupingPlan, PackedLoader, evaluation_batches
from mot_megatron.data.statistics import measure_corpus
from mot_megatron.errors import DataError
from mot_megatron.model.micro_batch import NO_LABEL, MicroBatch
from tests.data.corpora import random_documents, writer

DOCUMENTS = random_documents(120, 30, seed=5)
TOWERS = GroupingPlan(towers_of_modalities=(0, 1, 0), num_towers=2)


def is_context(ids: np.ndarray) -> np.ndarray:
    """Choose tokens by their ids, so that a label tells whether it should be one."""
    return ids % 3 == 0


def write(directory: Path, with_context: bool) -> Corpus:
    with writer(directory) as corpus:
        for split, documents in (("train", DOCUMENTS), ("validation", DOCUMENTS[:40])):
            for ids in documents:
                corpus.add_document(split, ids, is_context(ids) if with_context else None)
    return Corpus.open(directory)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write(tmp_path_factory.mktemp("plain") / "corpus", with_context=False)


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write(tmp_path_factory.mktemp("masked") / "corpus", with_context=True)


def test_a_corpus_without_context_has_no_trace_of_it(plain: Corpus) -> None:
    assert not list(plain.directory.glob("*.context"))
    assert "context" not in (plain.directory / "corpus.toml").read_text(encoding="utf-8")
    assert not plain.split("train").has_context


def test_intervals_round_trip(masked: Corpus) -> None:
    split = masked.split("train")
    for number, ids in enumerate(DOCUMENTS):
        assert np.array_equal(split.context_of(number), is_context(ids))
    counts = masked.description.splits["train"].context
    assert counts is not None
    assert counts.intervals == len(split.context) > 100
    of_text = sum(int((is_context(ids) & (ids < 100)).sum()) for ids in DOCUMENTS)
    assert counts.tokens_per_modality["text"] == of_text


def test_segments_may_be_context(tmp_path: Path) -> None:
    with writer(tmp_path / "corpus") as corpus:
        corpus.add("train", [("text", [1, 2]), ("image", [100]), ("text", [3])], context={0, 1})
        corpus.add("train", [("text", [4, 5])])
        corpus.add("validation", [("text", [6])])
    split = Corpus.open(tmp_path / "corpus").split("train")
    assert split.context_of(0).tolist() == [True, True, True, False]
    assert split.context_of(1).tolist() == [False, False]
    assert split.context.tolist() == [[0, 3]]


def test_context_that_fits_no_document_is_refused(tmp_path: Path) -> None:
    wrong = [
        (np.ones(2, dtype=bool), r"document 0 .*context of dtype bool and shape \(2,\), expected"),
        (np.ones(3, dtype=int), "context of dtype int64"),
    ]
    with writer(tmp_path / "first") as corpus:
        for context, message in wrong:
            with pytest.raises(DataError, match=message):
                corpus.add_document("train", np.array([1, 2, 3]), context)
        corpus.add("train", [("text", [1])])
    with writer(tmp_path / "corpus") as corpus:
        with pytest.raises(DataError, match=r"context has segment 1, expected 0\.\.0"):
            corpus.add("train", [("text", [1])], context={1})
        corpus.add("train", [("text", [1])])


def loader(corpus: Corpus, packing: str, sequences: int, seq_length: int = 64) -> PackedLoader:
    return PackedLoader(
        corpus,
        "train",
        seq_length=seq_length,
        micro_batch_size=sequences,
        grouping=TOWERS,
        shard=DataShard(0, 1),
        seed=1,
        packing=packing,  # pyright: ignore[reportArgumentType]
    )


def assert_labels(found: MicroBatch, everything: MicroBatch) -> int:
    """Compare with the batch of the corpus without context; return the labels left out."""
    labels = everything.labels.numpy()
    expected = np.where(is_context(labels), NO_LABEL, labels)
    assert np.array_equal(found.labels.numpy(), expected)
    for name in ("token_ids", "positions", "group_index", "filled"):
        assert np.array_equal(getattr(found, name).numpy(), getattr(everything, name).numpy())
    assert found.modality_tokens == everything.modality_tokens
    modalities = found.label_modalities.numpy()[expected != NO_LABEL]
    assert np.array_equal(modalities, everything.label_modalities.numpy()[expected != NO_LABEL])
    assert found.modality_labels == tuple(np.bincount(modalities, minlength=3).tolist())
    assert not found.label_modalities.numpy()[expected == NO_LABEL].any()
    return sum(everything.modality_labels) - sum(found.modality_labels)


@pytest.mark.parametrize(("packing", "sequences"), [("sequence", 2), ("budget", 4)])
def test_labels_of_training(plain: Corpus, masked: Corpus, packing: str, sequences: int) -> None:
    ours, theirs = loader(masked, packing, sequences), loader(plain, packing, sequences)
    dropped = [assert_labels(ours.next_micro_batch(), theirs.next_micro_batch()) for _ in range(20)]
    assert sum(dropped) > 300


@pytest.mark.parametrize("what", ["split", "truncate"])
def test_labels_of_long_documents(plain: Corpus, masked: Corpus, what: LongDocuments) -> None:
    """Documents have up to 30 tokens, and pieces up to 16."""
    ours, theirs = (
        loader(replace(corpus, long_documents=what), "sequence", 2, seq_length=16)
        for corpus in (masked, plain)
    )
    dropped = [assert_labels(ours.next_micro_batch(), theirs.next_micro_batch()) for _ in range(60)]
    assert sum(dropped) > 200


@pytest.mark.parametrize(("packing", "sequences"), [("sequence", 2), ("budget", 4)])
def test_labels_of_a_blend(masked: Corpus, tmp_path: Path, packing: str, sequences: int) -> None:
    """The other source has no context, and no id that would be."""
    with writer(tmp_path / "other") as corpus:
        for split in ("train", "validation"):
            for ids in DOCUMENTS:
                corpus.add_document(split, np.where(is_context(ids), ids + 1, ids))
    other = Corpus.open(tmp_path / "other")
    reader = loader(Blend.of([("masked", masked, 1), ("other", other, 2)]), packing, sequences)
    dropped = kept = 0
    for _ in range(30):
        batch = reader.next_micro_batch()
        slots, shape = batch.ungroup_index, batch.visible_from.shape
        ids, labels, filled = (
            each[slots].reshape(shape).numpy()
            for each in (batch.token_ids, batch.labels, batch.filled)
        )
        first = batch.visible_from.numpy()
        continues = filled[:, :-1] & filled[:, 1:] & (first[:, :-1] == first[:, 1:])
        expected = np.full(shape, NO_LABEL)
        expected[:, :-1] = np.where(continues & ~is_context(ids[:, 1:]), ids[:, 1:], NO_LABEL)
        assert np.array_equal(labels, expected)
        dropped += int((continues & is_context(ids[:, 1:])).sum())
        kept += int((labels != NO_LABEL).sum())
    assert kept > 4 * dropped > 400


def test_labels_of_evaluation(plain: Corpus, masked: Corpus) -> None:
    ours, theirs = (
        evaluation_batches(
            corpus,
            "validation",
            seq_length=64,
            micro_batch_size=2,
            grouping=TOWERS,
            shard=DataShard(0, 1),
        )
        for corpus in (masked, plain)
    )
    assert sum(assert_labels(*pair) for pair in zip(ours, theirs, strict=True)) > 50


def test_entropies_are_of_labels(plain: Corpus, masked: Corpus) -> None:
    for name, measured in measure_corpus(masked).items():
        modality = next(m for m in masked.description.modalities if m.name == name)
        later = np.concatenate([ids[1:] for ids in DOCUMENTS])
        inside = (later >= modality.first_id) & (later < modality.end_id)
        assert measured.train_tokens == int((inside & ~is_context(later)).sum())
        assert measure_corpus(plain)[name].train_tokens == int(inside.sum())


def test_sampled_entropies_are_of_labels(masked: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mot_megatron.data.statistics.LARGEST_SAMPLE", 600)
    for measured in measure_corpus(masked).values():
        assert measured.most_common % 3 != 0


def test_inspection_counts_them(
    masked: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = inspect(masked, tmp_path)
    counts = masked.description.splits["train"].context
    assert counts is not None
    assert report["splits"]["train"]["context"] == {
        "intervals": counts.intervals,
        "tokens_per_modality": counts.tokens_per_modality,
    }
    print_report(report)
    total = sum(counts.tokens_per_modality.values())
    shown = capsys.readouterr().out
    assert f"context only in train, never predicted: {total:,} tokens (text " in shown


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-16])


def rewritten(change: Callable[[np.ndarray], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        values = np.fromfile(path, "<i8").reshape(-1, 2)
        change(values)
        values.tofile(path)

    return damage


def swap(values: np.ndarray) -> None:
    values[[0, 1]] = values[[1, 0]]


def shift(values: np.ndarray) -> None:
    values[-1] += 100_000


def empty(values: np.ndarray) -> None:
    values[3, 1] = values[3, 0]


def widen(values: np.ndarray) -> None:
    values[0, 1] = values[1, 0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "No such file"),
        (truncate, r"bytes, expected \d+ for its \d+ intervals;"),
        (rewritten(swap), "interval 1 is .*expected sorted ones within the"),
        (rewritten(shift), r"interval \d+ is .*none of them empty"),
        (rewritten(empty), "interval 3 is .*none of them empty"),
        (rewritten(widen), "sha256 .* changed since it was written"),
    ],
)
def test_damage_is_noticed(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    corpus = write(tmp_path / "corpus", with_context=True)
    path = corpus.directory / "train.context"
    damage(path)
    with pytest.raises(DataError, match=message) as caught:
        Corpus.open(corpus.directory)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("image = ", "picture = ", r"splits\.train\.context\.tokens_per_modality has keys"),
        ("intervals = ", "intervals = -", r"splits\.train\.context\.intervals = -\d+"),
    ],
)
def test_descriptions_are_checked(tmp_path: Path, old: str, new: str, message: str) -> None:
    directory = write(tmp_path / "corpus", with_context=True).directory
    path = directory / "corpus.toml"
    head, found, tail = path.read_text(encoding="utf-8").partition("context = ")
    path.write_text(head + found + tail.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        Corpus.open(directory)
