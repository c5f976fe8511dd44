"""Held-out entropies of n-gram tables, which show how predictable a corpus is without a model.

A model that learns anything ends below the unigram entropy of each modality. One that uses more
than the nearest tokens ends below the entropy given two tokens of context. Tables are counted on
the training split and scored on the validation split, or on evenly spaced documents of a split that
has more than ``LARGEST_SAMPLE`` tokens; then they are upper bounds.

``CorpusWriter`` computes them when a corpus is written and keeps them in ``STATISTICS_FILE``, so
that training does not have to.

Shapes: n tokens of one modality; V ids in its range. The first token of a document is left out,
since it has no context and no model predicts it, and so are tokens that are context only, which
nothing is trained to predict. All of them are context of the tokens that follow.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mot_megatron.data.blend import sources_of
from mot_megatron.data.codebooks import codec_class, load_codec
from mot_megatron.data.codebooks.codec import PictureCodec
from mot_megatron.data.corpus import (
    HELD_OUT_SPLIT,
    TRAIN_SPLIT,
    Corpus,
    Modality,
    TokenSplit,
)
from mot_megatron.data.intervals import intervals_of, mask_of

STATISTICS_FILE = "statistics.json"
LARGEST_SAMPLE = 16_000_000
"""Tokens of a split that tables are counted on at most; they take up to 180 bytes of memory each,
for uniformly random ids (measured)."""
_UNIGRAM_COUNT = 0.1
"""Added to the count of each id, so that unseen ids have a probability."""


@dataclass(frozen=True)
class Entropies:
    """Held-out entropies of some tokens, in bits per token."""

    unigram: float
    one_token: float
    """Entropy given the previous token."""
    two_tokens: float
    """Entropy given the best pair of ``ModalityStatistics.pairs``."""


@dataclass(frozen=True)
class ModalityStatistics:
    """N-gram statistics of one modality."""

    train_tokens: int
    """Training tokens that tables were counted on."""
    validation_tokens: int
    """Held-out tokens that were scored."""
    all_tokens: Entropies
    without_most_common: Entropies
    """Entropies of validation tokens other than ``most_common``: for pictures, no background."""
    most_common: int
    """The most frequent id of the training split."""
    most_common_share: float
    """Its share of the validation tokens."""
    pairs: dict[int, float]
    """Distance d of the second context token -> entropy given the tokens 1 and d before."""

    @property
    def pair(self) -> int:
        """Distance of the pair that predicts best."""
        return min(self.pairs, key=lambda distance: self.pairs[distance])


def statistics_of(corpus: Corpus) -> dict[str, ModalityStatistics]:
    """Return what ``measure_corpus`` returned when the corpus was written, or measure it now.

    Raises:
        DataError: A split is missing.
    """
    with contextlib.suppress(OSError, ValueError, TypeError, LookupError, AttributeError):
        stored = json.loads((corpus.directory / STATISTICS_FILE).read_bytes())
        if stored["corpus"] == corpus.fingerprint:
            return {name: _parsed(values) for name, values in stored["modalities"].items()}
    return measure_corpus(corpus)


def render_statistics(corpus: Corpus) -> str:
    """Measure a corpus and return the content of its ``STATISTICS_FILE``."""
    measured = {name: asdict(each) for name, each in measure_corpus(corpus).items()}
    return json.dumps({"corpus": corpus.fingerprint, "modalities": measured}, indent=1) + "\n"


def _parsed(values: dict[str, Any]) -> ModalityStatistics:
    return ModalityStatistics(
        **{
            **values,
            "all_tokens": Entropies(**values["all_tokens"]),
            "without_most_common": Entropies(**values["without_most_common"]),
            "pairs": {int(distance): bits for distance, bits in values["pairs"].items()},
        }
    )


def measure_corpus(corpus: Corpus) -> dict[str, ModalityStatistics]:
    """Return the statistics of each modality that occurs in both splits, by name.

    The two-token context is the two previous tokens. For a modality that is a raster of codes, it
    is the previous token and the one above, if that pair predicts better.

    Raises:
        DataError: A split is missing.
    """
    train, validation = (_sample(corpus, name) for name in (TRAIN_SPLIT, HELD_OUT_SPLIT))
    vocab_size = corpus.description.vocab_size
    measured = {
        modality.name: _measure(
            modality, _context_distances(modality, corpus), train, validation, vocab_size
        )
        for modality in corpus.description.modalities
        if modality.width is None  # placeholders carry no information
    }
    return {name: statistics for name, statistics in measured.items() if statistics is not None}


def _sample(corpus: Corpus, name: str) -> TokenSplit:
    """Return a split, or evenly spaced documents of it with at most ``LARGEST_SAMPLE`` tokens.

    Training documents of a blend are sampled in the proportions in which they are read, without
    repetition; held-out documents in those of the splits.
    """
    parts = corpus.parts(name)
    sizes = [len(part.tokens) for part in parts]
    if len(parts) == 1:
        return _spaced(parts[0], LARGEST_SAMPLE)
    shares = [float(source.share) for source in sources_of(corpus)]
    if name == HELD_OUT_SPLIT:
        shares = [size / sum(sizes) for size in sizes]
    # The whole sample is limited by the source that is used up first.
    limit = min(LARGEST_SAMPLE, *(size / share for size, share in zip(sizes, shares, strict=True)))
    samples = [
        _spaced(part, max(int(part.lengths[0]), round(limit * share)))
        for part, share in zip(parts, shares, strict=True)
    ]
    lengths = np.concatenate([sample.lengths for sample in samples])
    tokens = np.concatenate([sample.tokens for sample in samples])
    masks = [mask_of(sample.context, 0, len(sample.tokens)) for sample in samples]
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    return TokenSplit(name, tokens, offsets, intervals_of(np.concatenate(masks)))


def _spaced(split: TokenSplit, most_tokens: int) -> TokenSplit:
    if len(split.tokens) <= most_tokens:
        return split
    stride = -(-len(split.tokens) // most_tokens)
    chosen = np.arange(0, len(split), stride)
    lengths = split.lengths[chosen]
    chosen = chosen[: np.searchsorted(np.cumsum(lengths), most_tokens, side="right")]
    offsets = np.concatenate(([0], np.cumsum(split.lengths[chosen])))
    tokens = [split[int(document)] for document in chosen]
    masks = [split.context_of(int(document)) for document in chosen] if split.has_context else []
    context = intervals_of(np.concatenate([np.empty(0, bool), *masks]))
    return TokenSplit(split.name, np.concatenate(tokens or [split.tokens[:0]]), offsets, context)


def _context_distances(modality: Modality, corpus: Corpus) -> list[int]:
    """Return 1, 2, and for a raster of codes the length of its rows."""
    if modality.codebook is None or not issubclass(codec_class(modality.codec), PictureCodec):
        return [1, 2]
    return sorted({1, 2, load_codec(corpus.directory, modality).row_length})


def _measure(
    modality: Modality,
    distances: list[int],
    train: TokenSplit,
    validation: TokenSplit,
    vocab_size: int,
) -> ModalityStatistics | None:
    """Return the statistics of one modality; None if a split has no token of it to predict."""
    seen, seen_context = _with_context(train, modality, distances, vocab_size)
    held, held_context = _with_context(validation, modality, distances, vocab_size)
    if not len(seen) or not len(held):
        return None
    counts = np.bincount(seen, minlength=modality.size)
    smoothed = counts + _UNIGRAM_COUNT
    unigram = (smoothed / smoothed.sum())[held]
    one = _witten_bell(seen_context[1], seen, held_context[1], held, unigram)
    # A pair of context ids is one number.
    pairs = {
        distance: _witten_bell(
            seen_context[1] * (vocab_size + 1) + seen_context[distance],
            seen,
            held_context[1] * (vocab_size + 1) + held_context[distance],
            held,
            one,
        )
        for distance in distances[1:]
    }
    bits = {distance: _bits(probability) for distance, probability in pairs.items()}
    two = pairs[min(bits, key=lambda distance: bits[distance])]
    common = int(counts.argmax())
    other = held != common
    return ModalityStatistics(
        train_tokens=len(seen),
        validation_tokens=len(held),
        all_tokens=Entropies(_bits(unigram), _bits(one), _bits(two)),
        without_most_common=Entropies(_bits(unigram[other]), _bits(one[other]), _bits(two[other])),
        most_common=modality.first_id + common,
        most_common_share=1.0 - float(other.mean()),
        pairs=bits,
    )


def _with_context(
    split: TokenSplit, modality: Modality, distances: list[int], vocab_size: int
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Return codes [n] of a modality, and for each distance the id that many tokens earlier, [n].

    Positions before the start of the document count as id ``vocab_size``.
    """
    tokens = np.asarray(split.tokens, dtype=np.int64)
    position = np.arange(len(tokens)) - np.repeat(split.offsets[:-1], split.lengths)
    inside = (tokens >= modality.first_id) & (tokens < modality.end_id) & (position > 0)
    if split.has_context:
        inside &= ~mask_of(split.context, 0, len(tokens))
    places = np.flatnonzero(inside)
    context = {
        distance: np.where(
            position[places] >= distance, tokens[np.maximum(places - distance, 0)], vocab_size
        )
        for distance in distances
    }
    return tokens[places] - modality.first_id, context


def _witten_bell(
    contexts: np.ndarray,
    tokens: np.ndarray,
    held_contexts: np.ndarray,
    held_tokens: np.ndarray,
    shorter: np.ndarray,
) -> np.ndarray:
    """Return the probability of each held-out token given its context, [m] float64.

    P(y | c) = (count(c, y) + types(c) * shorter(y)) / (count(c) + types(c)), where types(c) is the
    number of different tokens seen after c (Witten and Bell, 1991). For an unseen c, it is
    shorter(y).

    Args:
        contexts: [n] int64, one number per context.
        tokens: [n] int64, the tokens after these contexts.
        held_contexts: [m], contexts of the held-out tokens.
        held_tokens: [m], held-out tokens.
        shorter: [m], their probabilities given a shorter context.
    """
    known, index = np.unique(contexts, return_inverse=True)
    width = int(max(tokens.max(), held_tokens.max())) + 1
    bigrams, bigram_counts = np.unique(index * width + tokens, return_counts=True)
    context_counts = np.bincount(index, minlength=len(known))
    types = np.bincount(bigrams // width, minlength=len(known))

    place = np.minimum(np.searchsorted(known, held_contexts), len(known) - 1)
    found = known[place] == held_contexts
    key = place * width + held_tokens
    slot = np.minimum(np.searchsorted(bigrams, key), len(bigrams) - 1)
    count = np.where(found & (bigrams[slot] == key), bigram_counts[slot], 0)
    total = np.where(found, context_counts[place], 0)
    kinds = np.where(found, types[place], 1)
    return (count + kinds * shorter) / (total + kinds)


def _bits(probability: np.ndarray) -> float:
    """Return the mean information in bits; 0 for no tokens."""
    return float(-np.log2(probability).mean()) if len(probability) else 0.0
