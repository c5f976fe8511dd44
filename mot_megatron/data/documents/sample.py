"""A sample of the training documents, of bounded size, to train codebooks on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mot_megatron.data.builders.randomness import generator
from mot_megatron.data.codebooks.image import PICTURE_PIXELS
from mot_megatron.data.codebooks.speech import SpeechFeatures, speech_features
from mot_megatron.data.documents.decode import MediaFormat, decode_document
from mot_megatron.data.documents.raw import BrokenItemError, RawDocument
from mot_megatron.data.documents.sources import Reading, Shard, read_shard
from mot_megatron.data.structure import IMAGE

_SAMPLED_SHARDS = 256
"""Largest number of shards that are read for the sample."""
_CHARACTERS, _MEDIA, _UNITS = 10_000, 8, 100
"""Most that one document contributes: characters, pictures and sounds, units of each sound."""
_PIXELS = _MEDIA * PICTURE_PIXELS**2
"""Pixels that a document contributes on average at most; of large pictures, some are left out."""


@dataclass
class Sample:
    """Content of training documents."""

    texts: list[str] = field(default_factory=list)
    pictures: list[np.ndarray] = field(default_factory=list)
    """uint8 [p, p, 3] each."""
    sounds: list[SpeechFeatures] = field(default_factory=list)
    languages: set[str] = field(default_factory=set)
    kinds: set[str] = field(default_factory=set)
    """Kinds of segments that occur, whether or not they are kept."""

    def extend(self, other: Sample) -> None:
        """Append another sample."""
        self.texts += other.texts
        self.pictures += other.pictures
        self.sounds += other.sounds
        self.languages |= other.languages
        self.kinds |= other.kinds


@dataclass(frozen=True)
class ShardSampling:
    """What to take from one shard."""

    shard: Shard
    documents: int
    """Most documents to take."""
    seed: int
    number: int
    """Position of the shard among all shards, from which its random numbers are derived."""


def plan_sample(shards: Sequence[Shard], documents: int, seed: int) -> list[ShardSampling]:
    """Choose the shards to sample and how many documents each contributes at most."""
    most = min(len(shards), _SAMPLED_SHARDS, documents)
    chosen = sorted(generator(seed, "sampled shards").permutation(len(shards))[:most].tolist())
    each = math.ceil(documents / len(chosen))
    return [ShardSampling(shards[number], each, seed, number) for number in chosen]


def sample_shard(
    sampling: ShardSampling, reading: Reading, validation_share: float, form: MediaFormat
) -> Sample:
    """Take a uniform sample of a shard's documents, and of these keep the training documents.

    Broken documents are left out here; encoding reports them.
    """
    random = generator(sampling.seed, "sample", str(sampling.number))
    # Reservoir sampling: the sample stays uniform although the number of documents is unknown.
    kept: list[Sample] = []
    stride = math.ceil(form.pixels**2 / _PIXELS)
    for count, document in enumerate(read_shard(sampling.shard, reading), start=1):
        place = count - 1 if count <= sampling.documents else int(random.integers(count))
        if place >= sampling.documents:
            continue
        pictures = _MEDIA if place % stride == 0 else 0
        kept[place : place + 1] = [_content(document, validation_share, form, pictures)]
    sample = Sample()
    for content in kept:
        sample.extend(content)
    return sample


def _content(
    document: RawDocument, validation_share: float, form: MediaFormat, most_pictures: int
) -> Sample:
    """Return what a document contributes: nothing if it is held out or broken."""
    sample = Sample()
    most_pictures = min(most_pictures, math.ceil(_PIXELS / form.pixels**2))
    try:
        decoded = decode_document(document, validation_share, form)
    except BrokenItemError:
        return sample
    room = _CHARACTERS
    for segment in () if decoded.held_out else decoded.segments:
        if isinstance(segment.content, str):
            sample.texts.append(segment.content[:room])
            room -= len(sample.texts[-1])
        elif segment.kind == IMAGE:
            sample.pictures += [segment.content] if len(sample.pictures) < most_pictures else []
        elif len(sample.sounds) < _MEDIA:
            sample.sounds.append(_spread(speech_features(segment.content)))
        sample.kinds.add(segment.kind)
        if segment.language is not None:
            sample.languages.add(segment.language)
    return sample


def _spread(sound: SpeechFeatures) -> SpeechFeatures:
    """Return evenly spaced units of a long sound."""
    count = min(len(sound.units), _UNITS)
    places = np.linspace(0, len(sound.units) - 1, count).astype(int)
    return SpeechFeatures(sound.units[places], sound.mean)
