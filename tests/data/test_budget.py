"""Budget packing: its guarantees as properties, its fill, and its use by the loader."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mot_megatron.data.budget import (
    check_budgets,
    count_tower_tokens,
    describe_budgets,
    pack_budget,
    pack_budget_epoch,
    tower_budgets,
)
from mot_megatron.data.corpus import Corpus
from mot_megatron.data.loader import DataShard, GroupingPlan, PackedLoader
from mot_megatron.data.packing import Packing
from mot_megatron.errors import CheckpointError, DataError
from mot_megatron.model.micro_batch import NO_LABEL, MicroBatch

from .corpora import MODALITIES, PAD_TOKEN, write_corpus

SEQ_LENGTH = 64
MICRO_BATCH_SIZE = 4
PLAN = GroupingPlan(towers_of_modalities=(0, 1, 0), num_towers=3)
"""Text and speech share a tower; tower 2 has no modality."""


def mixed_documents(count: int, shortest: int, longest: int, towers: int = 3) -> np.ndarray:
    """Return counts [count, towers] of uniform lengths, each split in random proportions."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(shortest, longest + 1, count)
    shares = generator.dirichlet(np.ones(towers), count)
    counts = np.floor(shares * lengths[:, None]).astype(np.int32)
    counts[:, 0] += lengths - counts.sum(axis=1)
    return counts


def bin_counts(counts: np.ndarray, packing: Packing, sequences: int) -> np.ndarray:
    """Return the tokens per tower of each micro-batch, [micro-batches, K]."""
    ends = np.vstack([np.zeros_like(counts[:1]), counts[packing.order].cumsum(axis=0)])
    return np.diff(ends[packing.bin_offsets[::sequences]], axis=0)


def check(counts: np.ndarray, packing: Packing, budgets: tuple[int, ...], sequences: int) -> None:
    capacity = sum(budgets) // sequences
    assert sorted(packing.order.tolist()) == list(range(len(counts)))
    assert len(packing) % sequences == 0
    assert packing.bin_offsets[0] == 0
    assert packing.bin_offsets[-1] == len(counts)
    for number in range(len(packing)):
        assert counts[packing[number]].sum() <= capacity
    per_bin = bin_counts(counts, packing, sequences)
    assert (per_bin <= np.asarray(budgets)).all()
    assert (per_bin.sum(axis=1) > 0).all()


DOCUMENT = st.tuples(st.integers(0, 8), st.integers(0, 8), st.integers(0, 8)).filter(any)


@given(st.lists(DOCUMENT, min_size=1, max_size=80), st.integers(1, 4), st.integers(0, 2**31))
def test_every_document_once_within_capacity_and_budgets(
    documents: list[tuple[int, ...]], sequences: int, seed: int
) -> None:
    counts = np.array(documents, dtype=np.int32)
    budgets = (8 * sequences, 9 * sequences, 8 * sequences)  # any one document fits: 8 of each
    packing = pack_budget_epoch(
        counts, budgets, sequences=sequences, capacity=25, seed=seed, epoch=0
    )
    check(counts, packing, budgets, sequences)


@pytest.mark.parametrize("count", [639, 640, 641, 1500])
def test_every_document_is_packed_near_the_window_size(count: int) -> None:
    counts = mixed_documents(count, 1, 60)
    budgets = tower_budgets(counts, 512)
    check(counts, pack_budget(counts, budgets, sequences=4, capacity=128), budgets, 4)


def test_same_epoch_repeats_and_epochs_differ() -> None:
    counts = mixed_documents(300, 10, 60)
    budgets = tower_budgets(counts, 512)

    def orders(seed: int, epoch: int) -> list[int]:
        return pack_budget_epoch(
            counts, budgets, sequences=4, capacity=128, seed=seed, epoch=epoch
        ).order.tolist()

    assert orders(3, 0) == orders(3, 0)
    assert orders(3, 0) != orders(3, 1)
    assert orders(3, 0) != orders(4, 0)


@pytest.mark.parametrize(("sequences", "capacity"), [(4, 512), (8, 512), (2, 1024), (1, 2048)])
@pytest.mark.parametrize("towers", [1, 2, 3])
def test_pads_at_most_2_percent(sequences: int, capacity: int, towers: int) -> None:
    counts = mixed_documents(10_000, 30, 400, towers)
    budgets = tower_budgets(counts, sequences * capacity)
    packing = pack_budget_epoch(
        counts, budgets, sequences=sequences, capacity=capacity, seed=0, epoch=0
    )
    assert 1 - counts.sum() / (len(packing) * capacity) <= 0.02


@pytest.mark.parametrize(
    ("capacity", "least", "most"),
    [
        # The budget of 1190 image tokens of 2048 fits 18 images; 18.6 would fill it. 18 documents
        # of 110 tokens leave 3.3% padding with any packing.
        (512, 0.03, 0.045),
        # 37 of 37.2 images: 0.6%.
        (1024, 0.005, 0.02),
    ],
)
def test_large_segments_that_do_not_divide_a_budget_cost_padding(
    capacity: int, least: float, most: float
) -> None:
    """Each document has one image of 64 tokens and 16 to 76 text tokens."""
    texts = np.random.default_rng(0).integers(16, 77, 5000)
    counts = np.stack([texts, np.full(5000, 64)], axis=1).astype(np.int32)
    budgets = tower_budgets(counts, 4 * capacity)
    packing = pack_budget_epoch(counts, budgets, sequences=4, capacity=capacity, seed=0, epoch=0)
    check(counts, packing, budgets, 4)
    assert least < 1 - counts.sum() / (len(packing) * capacity) <= most


def test_high_padding_warns() -> None:
    (quiet,) = describe_budgets((1500, 548), ("text", "image"), 0.985).splitlines()
    assert quiet == "tokens of each micro-batch: text 1,500, image 548; 1.5% of them padding"
    first, second = describe_budgets((1500, 548), ("text", "image"), 0.96).splitlines()
    assert first.endswith("; 4.0% of them padding")
    assert second.startswith("warning: more than 2% padding")
    assert "data.seq_length" in second
    assert "training.micro_batch_size" in second


def test_documents_of_one_tower_as_long_as_a_sequence() -> None:
    """Each document fills a sequence, so 2 sequences with budgets (64, 64) hold one per tower."""
    counts = np.zeros((100, 2), dtype=np.int32)
    counts[::2, 0] = counts[1::2, 1] = 64
    packing = pack_budget_epoch(counts, (64, 64), sequences=2, capacity=64, seed=0, epoch=0)
    assert len(packing) == 100
    check(counts, packing, (64, 64), 2)


def test_micro_batches_of_an_epoch_are_shuffled() -> None:
    """The native packer leaves the worst fits for last; shuffling spreads them over the epoch."""
    counts = mixed_documents(2000, 30, 400)
    budgets = tower_budgets(counts, 2048)
    shape: dict[str, Any] = {"sequences": 4, "capacity": 512}
    of_core = bin_counts(counts, pack_budget(counts, budgets, **shape), 4).sum(axis=1)
    shuffled = pack_budget_epoch(counts, budgets, **shape, seed=0, epoch=0)
    of_epoch = bin_counts(counts, shuffled, 4).sum(axis=1)
    assert of_core.argmin() >= len(of_core) - 5
    assert of_epoch.argmin() < len(of_epoch) - 5


@pytest.mark.parametrize(
    ("tokens", "positions", "expected"),
    [
        ([1, 1, 1], 10, (4, 3, 3)),  # 3.33 each: equal remainders
        ([0, 5, 0], 8, (0, 8, 0)),
        ([1, 10, 89], 16, (0, 2, 14)),  # 0.16, 1.6, 14.24
    ],
)
def test_budgets_are_shares_by_largest_remainder(
    tokens: list[int], positions: int, expected: tuple[int, ...]
) -> None:
    assert tower_budgets(np.array([tokens], dtype=np.int32), positions) == expected


def test_error_names_a_document_that_exceeds_a_budget() -> None:
    counts = np.array([[3, 3], [1, 9]], dtype=np.int32)
    message = (
        r"corpus: document 1 has 9 tokens of tower 1, but the budget of a micro-batch is 8; raise "
        r'micro_batch_size or seq_length, or use packing = "sequence"'
    )
    with pytest.raises(DataError, match=message):
        check_budgets(counts, (8, 8), "corpus")
    with pytest.raises(DataError, match=message):
        pack_budget_epoch(
            counts, (8, 8), sequences=1, capacity=16, seed=0, epoch=0, source="corpus"
        )


def documents_of_segments(count: int) -> list[np.ndarray]:
    """Return documents of up to 30 tokens: some text, then image, then speech."""
    generator = np.random.default_rng(0)
    return [
        np.concatenate(
            [
                generator.integers(m.first_id, m.end_id, generator.integers(1, 11))
                for m in MODALITIES
            ]
        )
        for _ in range(count)
    ]


DOCUMENTS = documents_of_segments(400)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("corpora") / "corpus", train=DOCUMENTS)


def loader(corpus: Corpus, rank: int = 0, size: int = 1, **changes: Any) -> PackedLoader:
    arguments: dict[str, Any] = {
        "seq_length": SEQ_LENGTH,
        "micro_batch_size": MICRO_BATCH_SIZE,
        "grouping": PLAN,
        "shard": DataShard(rank, size),
        "seed": 1,
        "packing": "budget",
    }
    return PackedLoader(corpus, "train", **(arguments | changes))


def in_order(batch: MicroBatch, values: str) -> np.ndarray:
    """Return a per-slot tensor in sequence order, [b, s]."""
    return getattr(batch, values)[batch.ungroup_index].reshape(batch.visible_from.shape).numpy()


def test_counts_of_documents_are_exact(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    towers = np.array(PLAN.towers_of_modalities)[corpus.description.modality_of_id]
    expected = [np.bincount(towers[ids], minlength=3).tolist() for ids in DOCUMENTS]
    for chunk in (1 << 20, 40, 1):
        monkeypatch.setattr("mot_megatron.data.budget._TOKENS_PER_CHUNK", chunk)
        assert count_tower_tokens(corpus.split("train"), towers, 3, "x").tolist() == expected


def test_every_micro_batch_has_the_same_shapes(corpus: Corpus) -> None:
    reader = loader(corpus)
    budgets = reader.budgets
    assert budgets is not None
    tokens = np.concatenate(DOCUMENTS)
    image = int(((tokens >= 100) & (tokens < 160)).sum())
    share = image / len(tokens) * MICRO_BATCH_SIZE * SEQ_LENGTH
    assert abs(budgets[1] - share) < 1
    assert budgets == (256 - budgets[1], budgets[1], 0)
    found, filled, batches = [], 0, 0
    fill = reader.fill
    while reader.state_dict()["epoch"] == 0:
        batch = reader.next_micro_batch()
        assert batch.tower_tokens == batch.tower_slots == budgets
        filled += sum(batch.modality_tokens)
        batches += 1
        found += documents_without_tails(batch)
    assert sorted(found) == sorted(tuple(ids.tolist()) for ids in DOCUMENTS)
    assert fill == filled / (batches * 256) > 0.9


def documents_without_tails(batch: MicroBatch) -> list[tuple[int, ...]]:
    """Return the documents of a batch. A tail has no labels and only filler ids."""
    found = []
    ids, labels = in_order(batch, "token_ids"), in_order(batch, "labels")
    for row, numbers in enumerate(batch.visible_from.numpy()):
        for number in np.unique(numbers):
            where = numbers == number
            if (labels[row, where] != NO_LABEL).any():
                assert (labels[row, where][:-1] == ids[row, where][1:]).all()
                assert labels[row, where][-1] == NO_LABEL
                found.append(tuple(ids[row, where].tolist()))
            else:
                # Tower 0 is padded with the padding token, tower 1 with the first image id.
                assert set(ids[row, where].tolist()) <= {PAD_TOKEN, MODALITIES[1].first_id}
    return found


def stream(loaders: list[PackedLoader], count: int) -> list[list[int]]:
    """Return the next ``count`` micro-batches that all ranks read together, in stream order."""
    found = []
    while len(found) < count:
        found += [in_order(each.next_micro_batch(), "token_ids").tolist() for each in loaders]
        assert all(each.state_dict() == loaders[0].state_dict() for each in loaders)
    return found[:count]


@settings(max_examples=8)
@given(st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 4]), st.integers(1, 30))
def test_stream_resumes_with_any_data_parallel_size(
    corpus: Corpus, before: int, after: int, rounds: int
) -> None:
    expected = stream([loader(corpus)], before * rounds + 40)
    first = [loader(corpus, rank, before) for rank in range(before)]
    assert stream(first, before * rounds) == expected[: before * rounds]
    second = [loader(corpus, rank, after) for rank in range(after)]
    for each in second:
        each.load_state_dict(first[0].state_dict())
    assert stream(second, 40) == expected[before * rounds :]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packing": "sequence"}, "saved with packing = 'budget', but this run has 'sequence'"),
        ({"micro_batch_size": 8}, "saved with micro_batch_size = 4, but this run has 8"),
        ({"grouping": GroupingPlan((0, 1, 2), 3)}, "saved with budgets = '.*', but this run has"),
    ],
)
def test_position_in_another_stream_is_rejected(
    corpus: Corpus, changes: dict, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        loader(corpus, **changes).load_state_dict(loader(corpus).state_dict())


def test_position_inside_a_micro_batch_is_rejected(corpus: Corpus) -> None:
    reader = loader(corpus)
    with pytest.raises(CheckpointError, match="next_sequence = 6, expected a multiple of micro_b"):
        reader.load_state_dict(reader.state_dict() | {"next_sequence": 6})


def test_loader_error_names_a_document_that_exceeds_a_budget(tmp_path: Path) -> None:
    documents = [np.full(30, 5), np.full(30, 5), np.full(40, 100)]
    corpus = write_corpus(tmp_path / "corpus", train=documents)
    # 40 of 100 tokens are images: 0.4 * 64 = 25.6 positions of one sequence.
    message = r"document 2 has 40 tokens of the tower of image, but the budget .* is 26; raise"
    with pytest.raises(DataError, match=message):
        loader(corpus, micro_batch_size=1)
