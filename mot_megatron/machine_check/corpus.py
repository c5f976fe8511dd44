"""A corpus that is made on the spot, with the same bytes everywhere, and has something to learn."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from mot_megatron.data.builders.randomness import generator
from mot_megatron.data.corpus import Corpus, Modality
from mot_megatron.data.indexed import bin_path
from mot_megatron.data.writer import CorpusWriter

_MODALITIES = (
    Modality(name="text", first_id=0, size=256),
    Modality(name="image", first_id=256, size=128),
    Modality(name="speech", first_id=384, size=64),
)
_DOCUMENTS = {"train": 600, "validation": 24}
_SEED = 11
_LONGEST_SEGMENT = 60
_STEPS = (1, 2, 5)
"""A token is followed by one that is so many ids further on."""


def make_corpus(directory: Path) -> Corpus:
    """Return the corpus in ``directory``, written if it is not there yet.

    A document has one segment of each modality, or of two of them, in random order.
    """
    if not directory.exists():
        writer = CorpusWriter(
            directory=directory,
            name="machine-check",
            builder="mot_megatron.machine_check.corpus 1",
            seed=_SEED,
            modalities=_MODALITIES,
            pad_token=0,
        )
        with writer:
            for split, documents in _DOCUMENTS.items():
                for number in range(documents):
                    writer.add(split, _document(generator(_SEED, split, str(number))))
    return Corpus.open(directory)


def digest_of(corpus: Corpus) -> str:
    """Return the SHA-256 of the token files, which fixes what the model is trained on."""
    files = [bin_path(corpus.directory / split).read_bytes() for split in _DOCUMENTS]
    return hashlib.sha256(b"".join(files)).hexdigest()


def _document(random: np.random.Generator) -> list[tuple[str, np.ndarray]]:
    count = int(random.integers(2, 4))
    segments = []
    for index in random.permutation(len(_MODALITIES))[:count]:
        modality = _MODALITIES[index]
        length = int(random.integers(4, _LONGEST_SEGMENT + 1))
        steps = np.asarray(_STEPS)[random.integers(0, len(_STEPS), length)]
        ids = (int(random.integers(0, modality.size)) + steps.cumsum()) % modality.size
        segments.append((modality.name, modality.first_id + ids))
    return segments
