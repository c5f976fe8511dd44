"""Measured entropies compared with closed forms for synthetic sources."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mot_megatron.data.codebooks.image import PatchCodec
from mot_megatron.data.corpus import Corpus, Modality
from mot_megatron.data.statistics import ModalityStatistics, measure_corpus, statistics_of
from mot_megatron.data.writer import CorpusWriter

STATES = 4
DOCUMENT = 128


def build(directory: Path, modality: Modality, train: np.ndarray, held: np.ndarray) -> Corpus:
    other = Modality(name="other", first_id=modality.end_id, size=1)
    with CorpusWriter(
        directory=directory,
        name="synthetic",
        builder="test 1",
        seed=0,
        modalities=[modality, other],
        pad_token=0,
    ) as writer:
        if modality.codebook:
            codec = PatchCodec(modality, np.zeros((modality.size, 48), np.float32))
            writer.add_file(modality.codebook, codec.save())
        for split, documents in (("train", train), ("validation", held)):
            for document in documents:
                writer.add(split, [("main", document), ("other", [modality.end_id] * 2)])
    return Corpus.open(directory)


def measure(directory: Path, train: np.ndarray, held: np.ndarray) -> ModalityStatistics:
    modality = Modality(name="main", first_id=0, size=STATES)
    return measure_corpus(build(directory, modality, train, held))["main"]


def bits(probabilities: np.ndarray) -> np.ndarray:
    return -(probabilities * np.log2(probabilities)).sum(axis=-1)


def chain(transition: np.ndarray, documents: int, seed: int, lag: int = 1) -> np.ndarray:
    """Return [documents, 128] tokens, each of which depends on the one ``lag`` positions before."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, STATES, size=(documents, DOCUMENT))
    limits = transition.cumsum(axis=1)
    for place in range(lag, DOCUMENT):
        draw = random.random((documents, 1))
        tokens[:, place] = (draw > limits[tokens[:, place - lag]]).sum(axis=1)
    return tokens


# Doubly stochastic, so the stationary distribution is uniform and no warm-up is needed.
CIRCULANT = np.stack([np.roll([0.7, 0.2, 0.06, 0.04], shift) for shift in range(STATES)])


def test_markov_source(tmp_path: Path) -> None:
    found = measure(tmp_path / "c", chain(CIRCULANT, 800, 1), chain(CIRCULANT, 200, 2))
    assert found.train_tokens == 800 * (DOCUMENT - 1)  # a document's first token does not count
    assert found.validation_tokens == 200 * (DOCUMENT - 1)
    assert found.all_tokens.unigram == pytest.approx(2.0, abs=0.01)  # log2 of 4 states
    rate = bits(CIRCULANT[0])  # 1.25: every row has the same entropy
    assert found.all_tokens.one_token == pytest.approx(rate, abs=0.02)
    assert found.all_tokens.two_tokens == pytest.approx(rate, abs=0.02)


def test_second_order_source_needs_two_tokens(tmp_path: Path) -> None:
    train, held = chain(CIRCULANT, 800, 1, lag=2), chain(CIRCULANT, 200, 2, lag=2)
    found = measure(tmp_path / "c", train, held).all_tokens
    assert found.one_token == pytest.approx(2.0, abs=0.02)  # the previous token alone does not help
    # the second token of a document has no token two before: 1 of 127 costs 2 bits
    expected = (126 * bits(CIRCULANT[0]) + 2.0) / 127
    assert found.two_tokens == pytest.approx(expected, abs=0.02)


def test_raster_uses_the_token_above(tmp_path: Path) -> None:
    train, held = chain(CIRCULANT, 800, 1, lag=8), chain(CIRCULANT, 200, 2, lag=8)
    modality = Modality(
        name="main", first_id=0, size=STATES, codec="image_patches", codebook="image.npz"
    )
    found = measure_corpus(build(tmp_path / "c", modality, train, held))["main"]
    assert found.pair == 8
    assert set(found.pairs) == {2, 8}
    assert found.pairs[2] == pytest.approx(2.0, abs=0.02)
    expected = (120 * bits(CIRCULANT[0]) + 7 * 2.0) / 127
    assert found.all_tokens.two_tokens == pytest.approx(expected, abs=0.02)


def test_without_most_common(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    weights = np.array([0.1, 0.5, 0.2, 0.2])
    draws = [random.choice(STATES, size=(count, DOCUMENT), p=weights) for count in (800, 200)]
    found = measure(tmp_path / "c", *draws)
    assert found.most_common == 1
    assert found.most_common_share == pytest.approx(0.5, abs=0.02)
    assert found.all_tokens.unigram == pytest.approx(bits(weights), abs=0.02)
    # the others keep their probabilities: (0.1 log2 10 + 2 * 0.2 log2 5) / 0.5
    expected = (0.1 * np.log2(10) + 0.4 * np.log2(5)) / 0.5
    assert found.without_most_common.unigram == pytest.approx(expected, abs=0.03)


def test_unseen_tokens_have_nonzero_probability(tmp_path: Path) -> None:
    train, held = np.zeros((4, 16), np.int64), np.full((4, 16), 3)
    found = measure(tmp_path / "c", train, held).all_tokens
    # 60 zeros counted: P(3) = 0.1 / (60 + 4 * 0.1)
    assert found.unigram == pytest.approx(np.log2(60.4 / 0.1))
    assert np.isfinite([found.one_token, found.two_tokens]).all()


def test_modality_without_tokens_has_no_entropy(tmp_path: Path) -> None:
    modality = Modality(name="main", first_id=0, size=STATES)
    empty = Modality(name="unused", first_id=STATES, size=2)
    with CorpusWriter(
        directory=tmp_path / "c",
        name="synthetic",
        builder="test 1",
        seed=0,
        modalities=[modality, empty],
        pad_token=0,
    ) as writer:
        for split in ("train", "validation"):
            writer.add(split, [("main", [0, 1, 2])])
    assert set(measure_corpus(Corpus.open(tmp_path / "c"))) == {"main"}


def test_statistics_are_stored_when_the_corpus_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modality = Modality(name="main", first_id=0, size=STATES)
    corpus = build(tmp_path / "c", modality, chain(CIRCULANT, 30, 1), chain(CIRCULANT, 10, 2))
    measured = measure_corpus(corpus)
    with monkeypatch.context() as patch:
        patch.setattr("mot_megatron.data.statistics.measure_corpus", lambda _: {})
        assert statistics_of(corpus) == measured
        # Those of another corpus, or damaged ones, do not count.
        assert statistics_of(replace(corpus, fingerprint="another")) == {}
        path = corpus.directory / "statistics.json"
        for damaged in ("", "[]", path.read_text().replace("unigram", "bigram")):
            path.write_text(damaged)
            assert statistics_of(corpus) == {}
    path.unlink()
    assert statistics_of(corpus) == measured


def test_a_large_split_is_sampled_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second half of the documents has another distribution; both are in the sample."""
    monkeypatch.setattr("mot_megatron.data.statistics.LARGEST_SAMPLE", 13_000)
    train = np.concatenate((np.zeros((200, DOCUMENT), int), np.ones((200, DOCUMENT), int)))
    found = measure(tmp_path / "c", train, train[::2])
    # Of 400 documents with 130 tokens, every fourth is in the sample.
    assert found.train_tokens == 100 * (DOCUMENT - 1)
    assert found.all_tokens.unigram == pytest.approx(1, abs=1e-3)
    assert found.all_tokens.one_token == pytest.approx(0, abs=1e-2)
