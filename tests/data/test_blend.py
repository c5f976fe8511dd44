"""A blend of corpora stands for one corpus: its vocabulary, its counts, its stream of sequences."""

from __future__ import annotations

import json
from collections import Counter
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from mot_megatron.config import DataConfig
from mot_megatron.data import blend_stream
from mot_megatron.data.blend import Blend, open_training_data
from mot_megatron.data.blend_stream import progress_of_sources
from mot_megatron.data.corpus import Corpus, Modality, parse_description
from mot_megatron.data.loader import DataShard, GroupingPlan, PackedLoader, evaluation_batches
from mot_megatron.errors import CheckpointError, DataError
from mot_megatron.model.micro_batch import MicroBatch

from .corpora import random_documents, write_corpus, writer

SEQ_LENGTH = 64
PLAN = GroupingPlan(towers_of_modalities=(0, 1, 1), num_towers=2)
NAMES = ("web", "books", "talks")
SIZES = {"web": 90, "books": 40, "talks": 25}
Batch = list[tuple[int, ...]]


def marked(documents: list[np.ndarray], mark: int) -> list[np.ndarray]:
    """Begin every document with its source and its number, so that all documents differ."""
    return [np.concatenate(([mark, number], ids)) for number, ids in enumerate(documents)]


DOCUMENTS = {
    name: marked(random_documents(SIZES[name], 20 + 8 * place, seed=place), 190 + place)
    for place, name in enumerate(NAMES)
}
# Talks are nearly all text, so that shares of towers depend on the weights.
for ids in DOCUMENTS["talks"]:
    ids[1:] %= 100


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Corpus]:
    root = tmp_path_factory.mktemp("corpora")
    return {
        name: write_corpus(root / name, train=DOCUMENTS[name], validation=DOCUMENTS[name][:12])
        for name in NAMES
    }


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blend_stream, "WINDOW_DOCUMENTS", 70)
    monkeypatch.setattr(blend_stream, "_BINS", 1)


def blend(corpora: dict[str, Corpus], **weights: float) -> Blend:
    return Blend.of([(name, corpora[name], weight) for name, weight in weights.items()])


def loader(
    corpus: Corpus,
    rank: int = 0,
    size: int = 1,
    micro_batch_size: int = 2,
    packing: Literal["sequence", "budget"] = "sequence",
) -> PackedLoader:
    return PackedLoader(
        corpus,
        "train",
        seq_length=SEQ_LENGTH,
        micro_batch_size=micro_batch_size,
        grouping=PLAN,
        shard=DataShard(rank, size),
        seed=5,
        packing=packing,
    )


def documents_of(batch: MicroBatch) -> Batch:
    """Return the documents of a batch, without what fills up its sequences."""
    ids = batch.token_ids[batch.ungroup_index].reshape(batch.visible_from.shape).tolist()
    filled = batch.filled[batch.ungroup_index].reshape(batch.visible_from.shape).numpy()
    found = []
    for row, numbers, used in zip(ids, batch.visible_from.numpy(), filled, strict=True):
        end = int(used.sum())
        cuts = (np.flatnonzero(np.diff(numbers[:end])) + 1).tolist()
        found += [tuple(row[a:b]) for a, b in pairwise([0, *cuts, end])] if end else []
    return found


def read(readers: list[PackedLoader], rounds: int) -> Batch:
    """Return the documents that all ranks read together."""
    return [
        document
        for _ in range(rounds)
        for reader in readers
        for document in documents_of(reader.next_micro_batch())
    ]


def position_of(reader: PackedLoader) -> dict[str, Any]:
    """Return a position as a checkpoint keeps it."""
    return json.loads(json.dumps(reader.state_dict()))


def of_source(documents: Batch, name: str) -> Counter[tuple[int, ...]]:
    return Counter(ids for ids in documents if ids[0] == 190 + NAMES.index(name))


def read_to_the_end_of_a_window(reader: PackedLoader) -> Batch:
    """Read on until nothing of a window is left."""
    found = []
    window = position_of(reader)["window"]
    while position_of(reader)["window"] == window or position_of(reader)["next_sequence"]:
        found += read([reader], 1)
    return found


def assert_every_document_in_turn(documents: Batch, name: str) -> None:
    """Check that no document of a source was read again before all others were read."""
    counts = of_source(documents, name)
    everything = {tuple(ids.tolist()) for ids in DOCUMENTS[name]}
    assert set(counts) <= everything
    counted = [counts[ids] for ids in everything]
    assert max(counted) - min(counted) <= 1


@pytest.mark.parametrize(("size", "micro_batch_size"), [(2, 1), (4, 2), (3, 2), (1, 24)])
def test_every_layout_reads_the_same_stream(
    corpora: dict[str, Corpus], size: int, micro_batch_size: int
) -> None:
    both = blend(corpora, web=0.5, books=0.3, talks=0.2)
    readers = [loader(both, rank, size, micro_batch_size) for rank in range(size)]
    expected = read([loader(both, micro_batch_size=1)], 240)
    assert read(readers, 240 // (size * micro_batch_size)) == expected
    assert all(position_of(each) == position_of(readers[0]) for each in readers)


@pytest.mark.parametrize("packing", ["sequence", "budget"])
def test_resumes_anywhere_with_any_number_of_ranks(
    corpora: dict[str, Corpus], packing: Literal["sequence", "budget"]
) -> None:
    both = blend(corpora, web=2, books=1)
    whole = loader(both, packing=packing)
    positions = []
    for _ in range(40):
        positions.append(position_of(whole))
        read([whole], 1)
    for start in (1, 7, 25, 33):
        alone = loader(both, packing=packing)
        alone.load_state_dict(positions[start])
        assert alone.changes == []
        expected = read([alone], 12)
        assert positions[start + 2]["next_sequence"] != positions[start]["next_sequence"]
        split = [loader(both, rank, 3, packing=packing) for rank in range(3)]
        for each in split:
            each.load_state_dict(positions[start])
        assert read(split, 4) == expected
        assert position_of(split[0]) == position_of(alone)
        again = loader(both, packing=packing)
        again.load_state_dict(positions[start])
        assert position_of(again) == positions[start]


def test_order_of_the_sources_in_the_configuration_does_not_matter(
    corpora: dict[str, Corpus],
) -> None:
    one, other = blend(corpora, web=2, books=1), blend(corpora, books=1, web=2)
    reader, resumed = loader(one), loader(other)
    read([reader], 9)
    resumed.load_state_dict(position_of(reader))
    assert read([resumed], 30) == read([reader], 30)


def test_epochs_of_each_source_and_shares_of_tokens(corpora: dict[str, Corpus]) -> None:
    reader = loader(blend(corpora, web=0.6, books=0.3, talks=0.1))
    documents = []
    for _ in range(12):
        documents += read_to_the_end_of_a_window(reader)
        for name in NAMES:
            assert_every_document_in_turn(documents, name)
        tokens = {
            name: sum(len(ids) * n for ids, n in of_source(documents, name).items())
            for name in NAMES
        }
        total = sum(tokens.values())
        for progress, share in zip(
            progress_of_sources(position_of(reader)), (0.6, 0.3, 0.1), strict=True
        ):
            assert progress.tokens == tokens[progress.name]
            assert abs(progress.tokens - share * total) <= 40  # one document
            count = of_source(documents, progress.name).total()
            assert progress.epochs == count / SIZES[progress.name]
    assert progress_of_sources(position_of(reader))[1].epochs > 3


def test_progress_counts_what_was_read(corpora: dict[str, Corpus]) -> None:
    reader = loader(blend(corpora, web=1, books=1))
    documents: Batch = []
    for _ in range(60):
        for progress in progress_of_sources(position_of(reader)):
            counts = of_source(documents, progress.name)
            assert progress.tokens == sum(len(ids) * n for ids, n in counts.items())
        documents += read([reader], 1)


@pytest.mark.parametrize("packing", ["sequence", "budget"])
@pytest.mark.parametrize("batches", [1, 13, 30])
def test_other_weights_and_sources_go_on(
    corpora: dict[str, Corpus], batches: int, packing: Literal["sequence", "budget"]
) -> None:
    reader = loader(blend(corpora, web=0.7, books=0.3), packing=packing)
    documents = read([reader], batches)
    changes = [
        (
            {"web": 0.2, "books": 0.8},
            ["source web: 20.0% of the tokens, 70.0% before", "source books: 80.0%"],
        ),
        ({"web": 0.1, "books": 0.4, "talks": 0.5}, ["source talks: 50.0% of the tokens, new"]),
        ({"talks": 0.5, "web": 0.5}, ["source books: left out, after "]),
        ({"talks": 1}, ["source tiny: 100.0% of the tokens, 50.0% before", "source web: left"]),
    ]
    for weights, lines in changes:
        position = position_of(reader)
        mixed = blend(corpora, **weights) if len(weights) > 1 else corpora["talks"]
        reader = loader(mixed, packing=packing)
        reader.load_state_dict(position)
        for line in lines:
            assert any(change.startswith(line) for change in reader.changes), reader.changes
        documents += read([reader], batches)
    documents += read_to_the_end_of_a_window(reader)
    while reader.state_dict()["sources"][0]["carried"]:
        documents += read_to_the_end_of_a_window(reader)
    assert_every_document_in_turn(documents, "talks")
    # A resume without another change is exact again.
    position = position_of(reader)
    again = loader(corpora["talks"], packing=packing)
    again.load_state_dict(position)
    assert again.changes == []
    assert read([again], 5) == read([reader], 5)


@pytest.mark.parametrize("packing", ["sequence", "budget"])
def test_a_source_keeps_its_place_when_another_is_added_and_left_out(
    corpora: dict[str, Corpus], packing: Literal["sequence", "budget"]
) -> None:
    # Windows are read in part at every change, so that their documents must be carried.
    documents: Batch = []
    reader = loader(blend(corpora, web=1, books=1), packing=packing)
    weights: list[dict[str, float]] = [
        {"web": 1, "books": 1},
        {"web": 1, "books": 1, "talks": 1},
        {"web": 5, "books": 1},
        {"books": 1, "web": 30},
    ]
    for round_, each in enumerate(weights):
        position = position_of(reader)
        reader = loader(blend(corpora, **each), packing=packing)
        reader.load_state_dict(position)
        documents += read([reader], 3 + round_)
    assert sum(len(each["carried"]) for each in reader.state_dict()["sources"])
    while reader.state_dict()["next_sequence"] or any(
        each["carried"] for each in reader.state_dict()["sources"]
    ):
        documents += read([reader], 1)
    for name in ("web", "books"):
        assert_every_document_in_turn(documents, name)
        progress = {each.name: each for each in progress_of_sources(position_of(reader))}
        assert progress[name].epochs * SIZES[name] == of_source(documents, name).total()


@pytest.mark.parametrize("packing", ["sequence", "budget"])
@pytest.mark.parametrize("batches", [0, 3, 17])
def test_a_run_on_one_corpus_becomes_a_blend(
    corpora: dict[str, Corpus], batches: int, packing: Literal["sequence", "budget"]
) -> None:
    alone = loader(corpora["web"], packing=packing)
    documents = read([alone], batches)
    reader = loader(blend(corpora, books=1, web=1), packing=packing)
    reader.load_state_dict(position_of(alone))
    assert reader.changes == [
        "source books: 50.0% of the tokens, new",
        "source web: 50.0% of the tokens, 100.0% before",
    ]
    resumed = loader(blend(corpora, books=1, web=1), packing=packing)
    resumed.load_state_dict(position_of(reader))
    more = read([reader], 2)
    assert read([resumed], 2) == more
    documents += more
    for _ in range(4):
        documents += read_to_the_end_of_a_window(reader)
        for name in ("web", "books"):
            assert_every_document_in_turn(documents, name)
    progress = {each.name: each for each in progress_of_sources(position_of(reader))}
    counts = of_source(documents, "web")
    assert progress["web"].tokens == sum(len(ids) * n for ids, n in counts.items())


def test_some_source_must_stay(corpora: dict[str, Corpus]) -> None:
    reader, other = loader(blend(corpora, web=1, books=1)), loader(corpora["talks"])
    with pytest.raises(CheckpointError, match=r"sources web, books, but this run has .*must stay"):
        other.load_state_dict(position_of(reader))
    both = loader(blend(corpora, web=1, books=1))
    with pytest.raises(CheckpointError, match="at least one must stay"):
        both.load_state_dict(position_of(loader(corpora["talks"])))


def test_damaged_positions_are_errors(corpora: dict[str, Corpus]) -> None:
    both = blend(corpora, web=1, books=1)
    reader = loader(both)
    read([reader], 3)
    good = position_of(reader)

    def fails(message: str, **changes: object) -> None:
        with pytest.raises(CheckpointError, match=message):
            loader(both).load_state_dict({**good, **changes})

    fails("next_sequence = 9999, expected 0", next_sequence=9999)
    fails("seed = 6", seed=6)
    fails("has keys", more=1)
    for key, value in (
        ("lag", "x"), ("share", "1/0"), ("carried", "?"), ("epoch", -1), ("begun_alone", 3)
    ):  # fmt: skip
        sources = [{**good["sources"][0], key: value}, good["sources"][1]]
        fails("data position", sources=sources)
    fails("invalid sources", sources=[{}])
    many = {**good["sources"][0], "carried": "////////////"}
    with pytest.raises(CheckpointError):
        loader(both).load_state_dict({**good, "sources": [many, good["sources"][1]]})


def test_a_single_source_is_its_corpus(corpora: dict[str, Corpus]) -> None:
    folder = corpora["web"].directory
    alone = open_training_data(DataConfig(corpus=folder))
    one = open_training_data(
        DataConfig.model_validate({"sources": [{"corpus": folder, "weight": 1}]})
    )
    first, second = loader(alone), loader(one)
    for _ in range(60):
        left, right = first.next_micro_batch(), second.next_micro_batch()
        for name, value in vars(left).items():
            if torch.is_tensor(value):
                assert torch.equal(value, getattr(right, name)), name
        assert first.state_dict() == second.state_dict()


def test_budgets_follow_the_shares(corpora: dict[str, Corpus]) -> None:
    budgets = {}
    for weight in (0.1, 0.9):
        both = blend(corpora, web=weight, talks=1 - weight)
        reader = loader(both, micro_batch_size=4, packing="budget")
        shares = []
        for name in ("web", "talks"):
            tokens = corpora[name].description.splits["train"].tokens_per_modality
            shares.append(Fraction(tokens["text"], sum(tokens.values())))
        expected = weight * shares[0] + (1 - weight) * shares[1]
        assert reader.budgets is not None
        budgets[weight] = reader.budgets
        assert sum(reader.budgets) == 4 * SEQ_LENGTH
        assert abs(reader.budgets[0] - float(expected) * 4 * SEQ_LENGTH) < 1
        for _ in range(30):
            assert tuple(reader.next_micro_batch().tower_tokens) == reader.budgets
    assert budgets[0.1] != budgets[0.9]


def test_held_out_documents_are_those_of_all_sources(corpora: dict[str, Corpus]) -> None:
    def held_out(corpus: Corpus) -> Counter[tuple[int, ...]]:
        batches = evaluation_batches(
            corpus,
            "validation",
            seq_length=SEQ_LENGTH,
            micro_batch_size=2,
            grouping=PLAN,
            shard=DataShard(0, 1),
        )
        return Counter(ids for batch in batches for ids in documents_of(batch))

    both = blend(corpora, web=9, books=1)
    assert held_out(both) == held_out(corpora["web"]) + held_out(corpora["books"])


def test_documents_are_reported_with_their_source(corpora: dict[str, Corpus]) -> None:
    reader = loader(blend(corpora, web=1, books=1))
    read([reader], 4)
    position = position_of(reader)
    reported = reader.documents_at(position, 40)
    expected = read([reader], 20)
    found = [
        tuple(DOCUMENTS[name][number].tolist())
        for sequence in reported
        for name, number in sequence
    ]
    assert found == expected


def test_description_counts_what_is_read(corpora: dict[str, Corpus]) -> None:
    both = blend(corpora, web=0.25, books=0.75)
    train, held_out = (both.description.splits[name] for name in ("train", "validation"))
    singles = [corpora[name].description.splits for name in ("web", "books")]
    assert train.documents == SIZES["web"] + SIZES["books"]
    assert train.tokens == sum(each["train"].tokens for each in singles)
    assert sum(train.tokens_per_modality.values()) == train.tokens
    text = sum(
        share * each["train"].tokens_per_modality["text"] / each["train"].tokens
        for share, each in zip((0.25, 0.75), singles, strict=True)
    )
    assert abs(train.tokens_per_modality["text"] - text * train.tokens) <= 1
    for name in ("text", "image", "speech"):
        total = sum(each["validation"].tokens_per_modality[name] for each in singles)
        assert held_out.tokens_per_modality[name] == total
    assert parse_description(both.description_text(), "blend") == both.description
    other = blend(corpora, web=0.75, books=0.25)
    assert other.description.splits["train"].sha256 != train.sha256
    assert other.description.splits["validation"].sha256 == held_out.sha256


def test_different_vocabularies_are_named(tmp_path: Path, corpora: dict[str, Corpus]) -> None:
    modalities = list(corpora["web"].description.modalities)
    smaller = modalities[2].model_copy(update={"size": 39})
    with writer(tmp_path / "smaller", [*modalities[:2], smaller]) as corpus:
        for split in ("train", "validation"):
            corpus.add_document(split, np.array([1, 2]))
    other = Corpus.open(tmp_path / "smaller")
    with pytest.raises(
        DataError, match="size of modality speech is 40 in the first and 39 in the second"
    ):
        Blend.of([("web", corpora["web"], 1), ("smaller", other, 1)])

    coded = Modality(name="text", first_id=0, size=100, codec="bpe", codebook="text.json")
    found = []
    for name, content in (("one", b"1"), ("two", b"2")):
        with writer(tmp_path / name, [coded, *modalities[1:]]) as corpus:
            corpus.add_file("text.json", content)
            for split in ("train", "validation"):
                corpus.add_document(split, np.array([1, 2]))
        found.append(Corpus.open(tmp_path / name))
    with pytest.raises(DataError, match=r"one and .*two have .*: the codebooks of modality text"):
        Blend.of([("one", found[0], 1), ("two", found[1], 1)])


def test_the_same_corpus_twice_is_an_error(corpora: dict[str, Corpus]) -> None:
    with pytest.raises(DataError, match="are the same corpus"):
        Blend.of([("a", corpora["web"], 1), ("b", corpora["web"], 1)])
