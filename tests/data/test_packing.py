"""Packing compared with a brute-force reference, its guarantees, and how full sequences get."""

import sys
from itertools import combinations
from subprocess import run

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mot_megatron.data.packing import Packing, pack, pack_epoch
from mot_megatron.errors import DataError

CAPACITY = 40
LENGTHS = st.lists(st.integers(1, CAPACITY), min_size=1, max_size=60)


def reference_pack(lengths: list[int], capacity: int) -> list[list[int]]:
    """Pack by the documented rule in plain Python; return the document numbers of each bin."""
    left = list(range(len(lengths)))
    bins = []
    while left:
        documents = [left.pop(0)]
        room = capacity - lengths[documents[0]]
        while 2 * room * len(lengths) >= 5 * sum(lengths) and left and lengths[left[0]] <= room:
            documents.append(left.pop(0))
            room -= lengths[documents[-1]]
        while pair := best_pair([lengths[number] for number in left], room):
            for length in pair:
                number = next(number for number in left if lengths[number] == length)
                left.remove(number)
                documents.append(number)
                room -= length
        bins.append(documents)
    return bins


def best_pair(lengths: list[int], room: int) -> tuple[int, ...]:
    """Return the pair with the largest sum within room, most equal on ties, longer one first."""
    choices = [(length,) for length in set(lengths) if length <= room]
    choices += [
        tuple(sorted(pair, reverse=True)) for pair in combinations(lengths, 2) if sum(pair) <= room
    ]
    return max(choices, key=lambda choice: (sum(choice), -choice[0]), default=())


def bins_of(packing: Packing) -> list[list[int]]:
    return [packing[number].tolist() for number in range(len(packing))]


@given(LENGTHS)
def test_equals_the_reference(lengths: list[int]) -> None:
    assert bins_of(pack(np.array(lengths), CAPACITY)) == reference_pack(lengths, CAPACITY)


@pytest.mark.parametrize("capacity", [1, 63, 64, 65, 4095, 4096, 4097, 300_000])
def test_equals_the_reference_near_bitmap_boundaries(capacity: int) -> None:
    generator = np.random.default_rng(capacity)
    lengths = generator.integers(max(1, capacity // 20), capacity // 3 + 2, 100)
    lengths = np.minimum(lengths, capacity)
    lengths[:2] = (1, capacity)
    assert bins_of(pack(lengths, capacity)) == reference_pack(lengths.tolist(), capacity)


@given(LENGTHS, st.integers(0, 2**31), st.integers(0, 5))
def test_every_document_is_packed_once_unsplit_within_capacity(
    lengths: list[int], seed: int, epoch: int
) -> None:
    packing = pack_epoch(np.array(lengths), CAPACITY, seed=seed, epoch=epoch)
    assert sorted(packing.order.tolist()) == list(range(len(lengths)))
    assert packing.bin_offsets[0] == 0
    assert packing.bin_offsets[-1] == len(lengths)
    for documents in bins_of(packing):
        assert 0 < sum(lengths[document] for document in documents) <= CAPACITY


def test_epochs_differ_and_repeat() -> None:
    lengths = np.random.default_rng(0).integers(1, CAPACITY, 200)
    first = bins_of(pack_epoch(lengths, CAPACITY, seed=3, epoch=0))
    assert bins_of(pack_epoch(lengths, CAPACITY, seed=3, epoch=0)) == first
    assert bins_of(pack_epoch(lengths, CAPACITY, seed=3, epoch=1)) != first
    assert bins_of(pack_epoch(lengths, CAPACITY, seed=4, epoch=0)) != first


def test_epoch_shuffles_the_bins_of_the_native_packer() -> None:
    lengths = np.random.default_rng(0).integers(1, CAPACITY, 200)
    documents = np.random.default_rng([3, 1]).permutation(200)
    packing = pack(lengths[documents], CAPACITY)
    of_core = [documents[numbers].tolist() for numbers in bins_of(packing)]
    of_epoch = bins_of(pack_epoch(lengths, CAPACITY, seed=3, epoch=1))
    assert sorted(of_epoch) == sorted(of_core)
    assert of_epoch != of_core


@pytest.mark.parametrize("capacity", [512, 1024, 2048, 4096])
@pytest.mark.parametrize(("median", "spread"), [(130, 0.26), (58, 0.6)])  # p95 200; 159
def test_fills_more_than_99_percent(capacity: int, median: int, spread: float) -> None:
    generator = np.random.default_rng(0)
    lengths = np.rint(generator.lognormal(np.log(median), spread, 20_000)).astype(np.int64)
    lengths = lengths.clip(1, 400)
    packing = pack_epoch(lengths, capacity, seed=0, epoch=0)
    assert lengths.sum() / (len(packing) * capacity) > 0.99


def test_bins_stay_mixed() -> None:
    """Bins of 2048 hold about 16 documents. Sorting would spread their mean lengths 4-fold."""
    generator = np.random.default_rng(0)
    lengths = np.rint(generator.lognormal(np.log(130), 0.26, 20_000)).astype(np.int64)
    packing = pack_epoch(lengths, 2048, seed=0, epoch=0)
    means = [lengths[packing[number]].mean() for number in range(len(packing))]
    independent = lengths.std() / np.sqrt(len(lengths) / len(packing))
    assert np.std(means) < 1.3 * independent


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([1, 41, 2], "corpus: document 1 has 41 tokens, expected 1..40"),
        ([1, 2, 0], "corpus: document 2 has 0 tokens, expected 1..40"),
        ([], "corpus: no documents"),
    ],
)
def test_error_names_the_document_with_a_bad_length(lengths: list[int], message: str) -> None:
    array = np.array(lengths, dtype=np.int64)
    with pytest.raises(DataError, match=message):
        pack(array, CAPACITY, "corpus")
    with pytest.raises(DataError, match=message):
        pack_epoch(array, CAPACITY, seed=0, epoch=0, source="corpus")


def test_does_not_import_megatron() -> None:
    code = "import mot_megatron.data.packing, sys; assert 'megatron' not in sys.modules"
    run([sys.executable, "-c", code], check=True)
