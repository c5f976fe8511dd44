"""A corpus whose images are vectors, between texts and sounds of ids."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mot_megatron.data.corpus import Modality
from mot_megatron.data.writer import CorpusWriter

WIDTH = 6
PAD, BEGIN, END = 0, 1, 2
TEXT_SIZE = 100
PLACEHOLDER = TEXT_SIZE
MODALITIES = (
    Modality(name="text", first_id=0, size=TEXT_SIZE),
    Modality(
        name="image",
        first_id=PLACEHOLDER,
        size=1,
        width=WIDTH,
        begin_token=BEGIN,
        end_token=END,
    ),
    Modality(name="speech", first_id=PLACEHOLDER + 1, size=32),
)
FLOW = "model.modalities.image.objective.kind=flow_matching"
DIFFUSION = "model.modalities.image.objective.kind=diffusion"


def write_vector_corpus(directory: Path) -> Path:
    """Write documents of up to 40 positions, some without an image; return the folder."""
    random = np.random.default_rng(11)

    def text() -> tuple[str, np.ndarray]:
        return "text", 3 + (random.random(random.integers(1, 8)) ** 2 * 97).astype(int)

    def image() -> list[tuple[str, np.ndarray]]:
        vectors = random.normal(size=(random.integers(2, 9), WIDTH))
        return [("text", np.array([BEGIN])), ("image", vectors), ("text", np.array([END]))]

    def speech() -> tuple[str, np.ndarray]:
        return "speech", PLACEHOLDER + 1 + random.integers(0, 32, random.integers(1, 6))

    shapes = (
        lambda: [text(), *image()],
        lambda: [*image(), text(), *image(), speech()],
        lambda: [text(), speech()],
    )
    with CorpusWriter(
        directory=directory,
        name="vectors",
        builder="tests 1",
        seed=11,
        modalities=MODALITIES,
        pad_token=PAD,
        special_tokens={"<pad>": PAD, "<boi>": BEGIN, "<eoi>": END},
    ) as writer:
        for split, documents in (("train", 60), ("validation", 12)):
            for _ in range(documents):
                writer.add(split, shapes[random.integers(0, 3)]())
    return directory
