"""Corpus assembly: train the codebooks, encode the drafts, and write the documents.

The segments of a document are in random order (``data/structure.py`` says what surrounds them).
Codebooks are trained on the training split only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mot_megatron.data.builders.randomness import generator, split_of
from mot_megatron.data.codebooks.arrays import pack_arrays
from mot_megatron.data.codebooks.image import PatchCodec, train_image_codebook
from mot_megatron.data.codebooks.speech import (
    SpeechFeatures,
    UnitCodec,
    train_speech_codebook,
)
from mot_megatron.data.codebooks.text import TextCodec, train_text_codebook
from mot_megatron.data.corpus import Modality
from mot_megatron.data.structure import (
    IMAGE,
    KINDS,
    PADDING,
    SPEECH,
    TEXT,
    Piece,
    assemble,
    modalities_of,
    special_tokens,
)
from mot_megatron.data.writer import CorpusWriter
from mot_megatron.errors import DataError

TEXT_IDS, IMAGE_IDS, SPEECH_IDS = 4096, 1024, 500
LONGEST_SPEECH_UNITS = 200
"""Maximum length of a speech segment, 8 s; longer ones are truncated."""
SAMPLES_FILE = "samples.npz"
"""File of held-out pictures before encoding, for comparison with their reconstructions."""
NUM_SAMPLES = 96
_PICTURES_PER_SLICE, _UNITS_PER_SLICE = 1 << 13, 1 << 18
"""Items encoded at a time, since float32 copies of millions of vectors would not fit in memory.
Multiples of the slice size in ``kmeans``, so slicing here does not change the order of any sum."""


@dataclass(frozen=True)
class Draft:
    """A document before encoding."""

    key: str
    """Unique key, which seeds the document's random generators."""
    concept: str
    """Subject of the document. All documents of a concept are in the same split."""
    language: str
    text: str
    picture: np.ndarray | None = None
    """uint8 [32, 32, 3]."""
    speech: SpeechFeatures | None = None

    @property
    def split(self) -> str:
        """Name of the document's split."""
        return split_of(self.concept)


@dataclass(frozen=True)
class _Coded:
    """Token ids of the drafts, by draft key."""

    text: dict[str, list[int]]
    image: dict[str, np.ndarray]
    speech: dict[str, np.ndarray]


def open_writer(
    directory: Path,
    *,
    name: str,
    builder: str,
    seed: int,
    languages: Sequence[str],
    licences: Mapping[str, str],
) -> CorpusWriter:
    """Return a writer for a corpus of text, images and speech.

    Raises:
        DataError: ``directory`` already exists and is not an empty directory.
    """
    special = {token: index for index, token in enumerate(special_tokens(KINDS, languages))}
    sizes = {TEXT: TEXT_IDS, IMAGE: IMAGE_IDS, SPEECH: SPEECH_IDS}
    return CorpusWriter(
        directory=directory,
        name=name,
        builder=builder,
        seed=seed,
        modalities=modalities_of(sizes, special),
        pad_token=special[PADDING],
        special_tokens=special,
        licences=licences,
    )


def write_documents(writer: CorpusWriter, drafts: Sequence[Draft]) -> None:
    """Train the codebooks on the training split, then encode all drafts and write them.

    Raises:
        DataError: A split has no documents, there is too little data to train a codebook, or the
            disk is full.
    """
    for split in ("train", "validation"):
        if not any(draft.split == split for draft in drafts):
            raise DataError(f"{writer.directory}: no documents for split {split}; build more")
    training = [draft for draft in drafts if draft.split == "train"]
    coded = _Coded(
        _code_text(writer, drafts, training),
        _code_pictures(writer, drafts, training),
        _code_speech(writer, drafts, training),
    )
    shuffled = generator(writer.seed, "order of documents").permutation(len(drafts))
    order = sorted((drafts[index] for index in shuffled), key=lambda draft: draft.split)
    for draft in tqdm(order, desc="documents", ncols=100):
        writer.add_document(draft.split, _document(draft, coded, writer))


def _code_text(
    writer: CorpusWriter, drafts: Sequence[Draft], training: Sequence[Draft]
) -> dict[str, list[int]]:
    special = list(writer.special_tokens)
    content = train_text_codebook((draft.text for draft in training), TEXT_IDS, special)
    modality = writer.modalities[0]
    codec = TextCodec.parse(content, modality, f"{modality.codebook}")
    _add_codebook(writer, modality, content)
    ids = codec.encode_many([draft.text for draft in drafts])
    return {draft.key: ids[index] for index, draft in enumerate(drafts)}


def _code_pictures(
    writer: CorpusWriter, drafts: Sequence[Draft], training: Sequence[Draft]
) -> dict[str, np.ndarray]:
    trained = np.stack([draft.picture for draft in training if draft.picture is not None])
    modality = writer.modalities[1]
    codec = PatchCodec(modality, train_image_codebook(trained, modality.size, writer.seed))
    _add_codebook(writer, modality, codec.save())
    keys = [draft.key for draft in drafts if draft.picture is not None]
    pictures = np.stack([draft.picture for draft in drafts if draft.picture is not None])
    writer.add_file(SAMPLES_FILE, pack_arrays(pictures=_samples(drafts)))
    ids = _encode(codec.encode, pictures, _PICTURES_PER_SLICE, "images")
    return dict(zip(keys, ids, strict=True))


def _samples(drafts: Sequence[Draft]) -> np.ndarray:
    """Return held-out pictures of evenly spaced concepts, one each, [n, 32, 32, 3]."""
    by_concept: dict[str, np.ndarray] = {}
    for draft in drafts:
        if draft.split == "validation" and draft.picture is not None:
            by_concept.setdefault(draft.concept, draft.picture)
    pictures = list(by_concept.values())
    count = min(NUM_SAMPLES, len(pictures))
    return np.stack([pictures[int(at)] for at in np.linspace(0, len(pictures) - 1, count)])


def _code_speech(
    writer: CorpusWriter, drafts: Sequence[Draft], training: Sequence[Draft]
) -> dict[str, np.ndarray]:
    speeches = [draft.speech for draft in training if draft.speech is not None]
    trained = np.concatenate([speech.units for speech in speeches])
    mean = np.stack([speech.mean for speech in speeches if len(speech.units)]).mean(axis=0)
    modality = writer.modalities[2]
    centroids = train_speech_codebook(trained, modality.size, writer.seed)
    codec = UnitCodec(modality, centroids, mean.astype(np.float32))
    _add_codebook(writer, modality, codec.save())
    spoken = {draft.key: draft.speech.units for draft in drafts if draft.speech is not None}
    units = np.concatenate(list(spoken.values()))
    ids = _encode(codec.encode_features, units, _UNITS_PER_SLICE, "speech")
    ends = np.cumsum([len(units) for units in spoken.values()])
    return dict(zip(spoken, np.split(ids, ends[:-1]), strict=True))


def _encode(
    encode: Callable[[np.ndarray], np.ndarray],
    items: np.ndarray,
    per_slice: int,
    description: str,
) -> np.ndarray:
    """Return the ids of ``items``, encoding ``per_slice`` items at a time."""
    starts = range(0, len(items), per_slice)
    bar = tqdm(starts, desc=f"coding {description}", ncols=100)
    return np.concatenate([encode(items[start : start + per_slice]) for start in bar])


def _add_codebook(writer: CorpusWriter, modality: Modality, content: bytes) -> None:
    assert modality.codebook is not None
    writer.add_file(modality.codebook, content)


def _document(draft: Draft, coded: _Coded, writer: CorpusWriter) -> np.ndarray:
    text, image, speech = writer.modalities
    none = np.zeros(0, np.int64)
    pieces = [
        Piece(text, np.array(coded.text[draft.key], dtype=np.int64), draft.language),
        Piece(image, coded.image.get(draft.key, none)),
        Piece(speech, coded.speech.get(draft.key, none)[:LONGEST_SPEECH_UNITS]),
    ]
    pieces = [piece for piece in pieces if len(piece.ids)]
    order = generator(writer.seed, draft.key, "order of segments").permutation(len(pieces))
    return assemble([pieces[index] for index in order], writer.special_tokens)
