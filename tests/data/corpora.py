"""Small corpora for tests, written through the public writer."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mot_megatron.data.corpus import Corpus, Modality
from mot_megatron.data.writer import CorpusWriter

MODALITIES = (
    Modality(name="text", first_id=0, size=100),
    Modality(name="image", first_id=100, size=60, begin_token=3, end_token=4),
    Modality(name="speech", first_id=160, size=40),
)
VOCAB_SIZE = 200
PAD_TOKEN = 2


def writer(directory: Path, modalities: Sequence[Modality] = MODALITIES) -> CorpusWriter:
    """Return a writer with the settings shared by all test corpora."""
    return CorpusWriter(
        directory=directory,
        name="tiny",
        builder="tests 1",
        seed=0,
        modalities=modalities,
        pad_token=PAD_TOKEN,
        special_tokens={"<pad>": PAD_TOKEN},
        licences={"tests": "CC0"},
    )


def random_documents(count: int, longest: int, seed: int = 0) -> list[np.ndarray]:
    """Return documents of 1..longest ids; the first two ids of longer ones encode their number."""
    generator = np.random.default_rng(seed)
    documents = []
    for number in range(count):
        ids = generator.integers(0, VOCAB_SIZE, generator.integers(1, longest + 1))
        ids[:2] = (number // VOCAB_SIZE, number % VOCAB_SIZE)[: len(ids)]
        documents.append(ids)
    return documents


def write_corpus(directory: Path, **splits: list[np.ndarray]) -> Corpus:
    """Write and open a corpus with these documents per split."""
    with writer(directory) as corpus:
        for split, documents in splits.items():
            for ids in documents:
                corpus.add_document(split, ids)
    return Corpus.open(directory)
