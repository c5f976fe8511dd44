"""Continuous modalities in a corpus: vectors round-trip, and every fault is a one-line error."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mot_megatron.compare.curves import token_digests
from mot_megatron.data.corpus import Corpus, Modality, describe
from mot_megatron.data.latents import LatentDigests
from mot_megatron.data.statistics import statistics_of
from mot_megatron.data.writer import CorpusWriter
from mot_megatron.errors import ConfigError, DataError
from mot_megatron.train.session import resolve_config
from tests.small_runs import small_config
from tests.vector_corpus import FLOW

WIDTH, PLACEHOLDER = 3, 20
BEGIN, END = 3, 4
TEXT = Modality(name="text", first_id=0, size=PLACEHOLDER)
IMAGE = Modality(
    name="image", first_id=PLACEHOLDER, size=1, width=WIDTH, begin_token=BEGIN, end_token=END
)
SPEECH = Modality(name="speech", first_id=PLACEHOLDER + 1, size=5)
MODALITIES = (TEXT, IMAGE, SPEECH)

Segments = list[tuple[str, Any]]


def writer(directory: Path, modalities: tuple[Modality, ...] = MODALITIES) -> CorpusWriter:
    return CorpusWriter(
        directory=directory,
        name="tiny",
        builder="tests 1",
        seed=0,
        modalities=modalities,
        pad_token=0,
    )


def random_document(generator: np.random.Generator) -> Segments:
    """Return some text, and up to three images with a token before each."""
    document: Segments = [("text", generator.integers(5, PLACEHOLDER, 4))]
    for _ in range(generator.integers(0, 4)):
        vectors = generator.normal(size=(generator.integers(1, 6), WIDTH))
        document += [("text", [BEGIN]), ("image", vectors), ("text", [END])]
    return document


def documents_of(seed: int, count: int) -> list[Segments]:
    generator = np.random.default_rng(seed)
    return [random_document(generator) for _ in range(count)]


def write(directory: Path) -> dict[str, list[Segments]]:
    """Write a corpus with two splits; return its documents."""
    splits = {"train": documents_of(1, 20), "validation": documents_of(2, 5)}
    with writer(directory) as corpus:
        for split, documents in splits.items():
            for document in documents:
                corpus.add(split, document)
    return splits


def test_vectors_round_trip(tmp_path: Path) -> None:
    splits = write(tmp_path / "corpus")
    corpus = Corpus.open(tmp_path / "corpus")
    assert corpus.description.format == 2
    assert corpus.description.continuous == {"image": WIDTH}
    for name, documents in splits.items():
        split = corpus.split(name)
        latents = split.latents["image"]
        for number, document in enumerate(documents):
            vectors = [content for modality, content in document if modality == "image"]
            expected = np.concatenate([np.empty((0, WIDTH)), *vectors]).astype(np.float16)
            assert np.array_equal(latents[number], expected)
            assert (split[number] == PLACEHOLDER).sum() == len(expected)
        with pytest.raises(IndexError):
            latents[len(documents)]
    corpus.check_latents()
    assert "image" not in statistics_of(corpus)


def test_a_split_without_images(tmp_path: Path) -> None:
    with writer(tmp_path / "corpus") as corpus:
        corpus.add("train", [("text", [5, 6])])
    latents = Corpus.open(tmp_path / "corpus").split("train").latents["image"]
    assert latents[0].shape == (0, WIDTH)


def test_tokens_alone_are_written_in_format_1(tmp_path: Path) -> None:
    tokens = (TEXT, Modality(name="speech", first_id=PLACEHOLDER, size=5))
    with writer(tmp_path / "corpus", tokens) as corpus:
        corpus.add("train", [("text", [5, 6])])
    text = (tmp_path / "corpus" / "corpus.toml").read_text()
    assert text.startswith("format = 1\n")
    assert "width" not in text
    assert "latents" not in text
    # As before there were continuous modalities, because checkpoints record it.
    digest = Corpus.open(tmp_path / "corpus").vocabulary_digest
    assert digest == "2e39a219dd2b028983e8dc7894b4422ab822a80005f5e37ed8d8a3e441029412"


def test_digests_of_runs_cover_vectors(tmp_path: Path) -> None:
    digests = []
    for number in range(2):
        directory = tmp_path / str(number)
        with writer(directory) as corpus:
            corpus.add("train", [("text", [5]), ("image", np.array([[0.0, 1.0, number]]))])
        digests.append(token_digests(Corpus.open(directory).description)["train"])
    assert digests[0] != digests[1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], r"image.objective.kind = 'next_token' is not for vectors, of which image consists"),
        (
            ["model.modalities.text.objective.kind=diffusion", FLOW],
            "text.objective.kind = 'diffusion' is not for tokens",
        ),
        ([FLOW, "model.modalities.image.width=4"], "image.width = 4; the corpus has 3"),
    ],
)
def test_objectives_fit_the_content(tmp_path: Path, overrides: list[str], message: str) -> None:
    write(tmp_path / "corpus")
    corpus = Corpus.open(tmp_path / "corpus")
    with pytest.raises(ConfigError, match=message):
        resolve_config(small_config(tmp_path / "corpus", overrides), corpus)


def test_the_width_comes_from_the_corpus(tmp_path: Path) -> None:
    write(tmp_path / "corpus")
    config = resolve_config(
        small_config(tmp_path / "corpus", [FLOW]), Corpus.open(tmp_path / "corpus")
    )
    assert config.model.widths == {"image": WIDTH}
    assert resolve_config(config, Corpus.open(tmp_path / "corpus")) == config


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([("image", np.zeros((2, 4)))], r"shape \(2, 4\), expected numbers of shape \[n, 3\]"),
        ([("image", [1, 2, 3])], r"shape \(3,\), expected"),
        ([("image", [["a", "b", "c"]])], "expected numbers"),
        ([("image", [[0, 0, 0], [0, np.nan, 0]])], "vector 1 has nan at 1, expected a number"),
        ([("image", [[0, 0, 1e5]])], "vector 0 has 100000.0 at 2, expected .* -65504 to 65504"),
        ([("image", np.zeros((0, 3)))], "empty"),
        ([("image", np.zeros((1, 3)))] * 2, "two segments of modality image without a token"),
        ([("text", [PLACEHOLDER])], f"token id {PLACEHOLDER} in a segment of modality text"),
    ],
)
def test_bad_segments(tmp_path: Path, segments: Segments, message: str) -> None:
    with pytest.raises(DataError, match=message), writer(tmp_path / "corpus") as corpus:
        corpus.add("train", segments)
    assert list(tmp_path.iterdir()) == []


def test_placeholders_without_vectors(tmp_path: Path) -> None:
    message = f"token id {PLACEHOLDER} is the placeholder of modality image"
    with pytest.raises(DataError, match=message), writer(tmp_path / "corpus") as corpus:
        corpus.add_document("train", np.array([1, PLACEHOLDER]))
    with pytest.raises(DataError, match="no vectors"), writer(tmp_path / "corpus") as corpus:
        corpus.link("train", tmp_path / "tokens")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modalities": (TEXT, IMAGE.model_copy(update={"size": 2}))}, "expected size = 1"),
        ({"modalities": (IMAGE.model_copy(update={"first_id": 0}),)}, "expected one of tokens"),
        ({"format": 1}, "modality image has a width, expected format = 2"),
        ({"pad_token": PLACEHOLDER}, f"pad_token is {PLACEHOLDER}, the placeholder of modality"),
        ({"special_tokens": {"<x>": PLACEHOLDER}}, "special_tokens.<x> is .*, the placeholder"),
    ],
)
def test_bad_descriptions(changes: dict[str, Any], message: str) -> None:
    values = {
        "format": 2,
        "name": "tiny",
        "builder": "tests 1",
        "seed": 0,
        "pad_token": 0,
        "modalities": (TEXT, IMAGE),
        **changes,
    }
    values["vocab_size"] = sum(modality.size for modality in values["modalities"])
    with pytest.raises(DataError, match=message):
        describe(values, "corpus.toml")


def truncate(directory: Path) -> None:
    path = directory / "train.image.rows"
    path.write_bytes(path.read_bytes()[:-1])


def remove(directory: Path) -> None:
    (directory / "train.image.offsets").unlink()


def move_row(directory: Path) -> None:
    """Give the last vector of a document to the next one, and correct the digest."""
    path = directory / "train.image.offsets"
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    change_offsets(directory)
    text = (directory / "corpus.toml").read_text()
    after = hashlib.sha256(path.read_bytes()).hexdigest()
    (directory / "corpus.toml").write_text(text.replace(before, after))


def change_offsets(directory: Path) -> None:
    path = directory / "train.image.offsets"
    offsets = np.fromfile(path, dtype=np.int64)
    first = int(np.flatnonzero(np.diff(offsets))[0])
    offsets[first + 1] -= 1
    path.write_bytes(offsets.tobytes())


def descend(directory: Path) -> None:
    path = directory / "train.image.offsets"
    offsets = np.fromfile(path, dtype=np.int64)
    offsets[1] = offsets[-1] + 1
    path.write_bytes(offsets.tobytes())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"train.image.rows: \d+ bytes, expected \d+ \(\d+ vectors of 3\)"),
        (remove, "train.image.offsets: no such file"),
        (change_offsets, "train.image.offsets: sha256 .*changed since it was written"),
        (move_row, r"document \d+ has \d+ vectors, but its tokens have \d+ placeholders"),
        (descend, "its offsets do not ascend from 0 to"),
    ],
)
def test_damaged_files(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    write(tmp_path / "corpus")
    damage(tmp_path / "corpus")
    with pytest.raises(DataError, match=message) as caught:
        Corpus.open(tmp_path / "corpus")
    assert "\n" not in str(caught.value)


def test_changed_vectors_are_found_on_request(tmp_path: Path) -> None:
    write(tmp_path / "corpus")
    path = tmp_path / "corpus" / "train.image.rows"
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(bytes(content))
    corpus = Corpus.open(tmp_path / "corpus")
    with pytest.raises(DataError, match=r"train\.image\.rows: sha256 .*changed since"):
        corpus.check_latents()


def test_digests_are_of_the_files(tmp_path: Path) -> None:
    write(tmp_path / "corpus")
    counts = Corpus.open(tmp_path / "corpus").description.splits["train"]
    found = {
        kind: hashlib.sha256((tmp_path / "corpus" / f"train.image.{kind}").read_bytes()).hexdigest()
        for kind in ("rows", "offsets")
    }
    assert counts.latents == {"image": LatentDigests(**found)}
