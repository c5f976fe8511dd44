"""Batches that a thread prepares ahead are those of the plain loader, and so is the position."""

from __future__ import annotations

import random
from typing import Literal

import pytest

from mot_megatron.data.corpus import Corpus
from mot_megatron.data.loader import DataShard, PackedLoader
from mot_megatron.data.prefetch import PrefetchedLoader
from mot_megatron.errors import DataError
from tests.data.test_loader import DOCUMENTS, PLAN, SEQ_LENGTH, assert_equal_batches

from .corpora import write_corpus

ARGUMENTS = {
    "seq_length": SEQ_LENGTH,
    "micro_batch_size": 2,
    "grouping": PLAN,
    "shard": DataShard(1, 2),
    "seed": 1,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    directory = tmp_path_factory.mktemp("corpora") / "corpus"
    return write_corpus(directory, train=DOCUMENTS, validation=DOCUMENTS[:50])


@pytest.mark.parametrize("ahead", [1, 3, 100])
@pytest.mark.parametrize("packing", ["sequence", "budget"])
def test_batches_and_positions_are_the_same(
    corpus: Corpus, ahead: int, packing: Literal["sequence", "budget"]
) -> None:
    """Batches are taken over several epochs, and the position is set back now and then."""
    plain = PackedLoader(corpus, "train", packing=packing, **ARGUMENTS)
    fetched = PrefetchedLoader(
        corpus, "train", packing=packing, ahead=ahead, pin=False, **ARGUMENTS
    )
    assert (fetched.fill, fetched.budgets) == (plain.fill, plain.budgets)
    chance, positions = random.Random(ahead), [plain.state_dict()]
    for _ in range(100):
        if chance.random() < 0.1:
            position = chance.choice(positions)
            plain.load_state_dict(position)
            fetched.load_state_dict(position)
        else:
            assert_equal_batches(fetched.next_micro_batch(), plain.next_micro_batch())
        assert fetched.state_dict() == plain.state_dict()
        positions.append(plain.state_dict())
    assert max(int(position["epoch"]) for position in positions) > 1
    assert fetched.documents_at(positions[5], 7) == plain.documents_at(positions[5], 7)


def test_an_error_in_the_thread_is_raised_by_the_batch_it_belongs_to(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def next_or_fail(loader: PackedLoader) -> object:
        calls.append(loader)
        if len(calls) == 3:
            raise DataError("train.bin: cannot be read")
        return plain(loader)

    plain = PackedLoader.next_micro_batch
    monkeypatch.setattr(PackedLoader, "next_micro_batch", next_or_fail)
    loader = PrefetchedLoader(corpus, "train", ahead=4, pin=False, **ARGUMENTS)
    loader.next_micro_batch()
    loader.next_micro_batch()
    with pytest.raises(DataError, match=r"train.bin: cannot be read"):
        loader.next_micro_batch()


def test_the_position_does_not_run_ahead(corpus: Corpus) -> None:
    loader = PrefetchedLoader(corpus, "train", ahead=10, pin=False, **ARGUMENTS)
    begin = loader.state_dict()
    first = loader.next_micro_batch()
    after = loader.state_dict()
    assert begin != after
    loader.load_state_dict(begin)
    assert_equal_batches(loader.next_micro_batch(), first)
    assert loader.state_dict() == after
