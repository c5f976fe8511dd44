"""Opening a corpus checks every file and key; each fault gives its own one-line error."""

import errno
import gc
import hashlib
import os
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from mot_megatron.data.corpus import Corpus
from mot_megatron.data.indexed import read_token_file
from mot_megatron.errors import DataError

from .corpora import random_documents, write_corpus

DOCUMENTS = [np.array([1, 2, 3]), np.array([150, 160]), np.array([7])]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "corpus", train=DOCUMENTS, validation=DOCUMENTS[:1])
    return tmp_path / "corpus"


def replace(directory: Path, old: str, new: str) -> None:
    path = directory / "corpus.toml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def write_tokens(directory: Path, documents: list[np.ndarray], dtype: type = np.uint16) -> None:
    """Replace the training split with one that the writer would reject, with matching digests."""
    recorded = tomllib.loads((directory / "corpus.toml").read_text())["splits"]["train"]["sha256"]
    builder = IndexedDatasetBuilder(str(directory / "train.bin"), dtype=dtype)
    for ids in documents:
        builder.add_document(torch.from_numpy(ids), [len(ids)])
    builder.finalize(str(directory / "train.idx"))
    for kind in ("bin", "idx"):
        digest = hashlib.sha256((directory / f"train.{kind}").read_bytes()).hexdigest()
        replace(directory, recorded[kind], digest)


def test_offsets_lengths_and_modalities(directory: Path) -> None:
    corpus = Corpus.open(directory)
    split = corpus.split("train")
    assert split.offsets.tolist() == [0, 3, 5, 6]
    assert split.lengths.tolist() == [3, 2, 1]
    assert split.tokens.tolist() == [1, 2, 3, 150, 160, 7]
    # Ranges of 100, 60 and 40 ids.
    assert corpus.description.modality_of_id.tolist() == [0] * 100 + [1] * 60 + [2] * 40
    with pytest.raises(IndexError):
        split[3]


def test_fingerprint_depends_on_the_content(tmp_path: Path, directory: Path) -> None:
    same = write_corpus(tmp_path / "same", train=DOCUMENTS, validation=DOCUMENTS[:1])
    other = write_corpus(tmp_path / "other", train=DOCUMENTS[::-1], validation=DOCUMENTS[:1])
    fingerprint = Corpus.open(directory).fingerprint
    assert same.fingerprint == fingerprint
    assert other.fingerprint != fingerprint


def test_tokens_stay_valid_after_the_corpus_is_freed(directory: Path) -> None:
    corpus = Corpus.open(directory)
    document = corpus.split("train")[1]
    del corpus
    gc.collect()
    assert document.tolist() == [150, 160]
    with pytest.raises(ValueError, match="read-only"):
        document[0] = 1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("format = 1", "format = 3", "format = 3, expected 1 or 2"),
        ("format = 1", "", "format = None, expected 1 or 2"),
        ("seed = 0", "seed = 0\nsead = 1", "sead: unknown key"),
        ("size = 60", "size = 60\nshape = 2", "modalities.1.shape: unknown key"),
        ("seed = 0", "", "seed: required, but absent"),
        ("seed = 0", 'seed = "0"', "seed = '0': input should be a valid integer"),
        ("seed = 0", "seed = ", "not valid TOML"),
        ("pad_token = 2", "pad_token = 200", "pad_token is 200, expected 0..199"),
        ("first_id = 100", "first_id = 99", "modality image has first_id = 99, expected 100"),
        ("first_id = 100", "first_id = 101", "modality image has first_id = 101, expected 100"),
        ("vocab_size = 200", "vocab_size = 201", "vocab_size = 201, expected 200"),
        ('"image"', '"text"', "expected each name once"),
        ('codec = "none"', 'codec = "mp3"', "modalities.0.codec = 'mp3'"),
        ('codec = "none"', 'codec = "bpe"', "every codec except 'none' needs a codebook"),
        ("begin_token = 3", "begin_token = 100", "outside its own range 100..159"),
        ("end_token = 4", "end_token = 200", "end_token of modality image is 200"),
        ('"<pad>" = 2', '"<pad>" = 999', "special_tokens.<pad> is 999"),
        ("documents = 3", "documents = 4", "splits.train.documents = 4, but train.idx has 3"),
        ("tokens = 6", "tokens = 7", "splits.train.tokens = 7, but train.idx has 6"),
        ("longest_document = 3", "longest_document = 2", "longest_document = 2, but .* has 3"),
        ("image = 1,", "image = 2,", "per_modality.image = 2, but train.bin has 1"),
        ("image = 1,", "", "tokens_per_modality has keys"),
    ],
)
def test_invalid_descriptions_are_rejected(
    directory: Path, old: str, new: str, message: str
) -> None:
    replace(directory, old, new)
    with pytest.raises(DataError, match=message) as caught:
        Corpus.open(directory)
    assert str(caught.value).startswith(str(directory / "corpus.toml"))
    assert "\n" not in str(caught.value)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0\0")


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train.bin", Path.unlink, "no such file"),
        ("train.idx", Path.unlink, "no such file"),
        ("train.bin", truncate, "11 bytes, expected 12 .6 tokens according to train.idx"),
        ("train.bin", empty, "0 bytes, expected 12"),
        ("train.bin", append, "14 bytes, expected 12"),
        ("train.idx", truncate, "truncated or replaced"),
        ("train.idx", append, "truncated or replaced"),
        ("train.idx", empty, "not an index of a Megatron token file"),
        ("train.idx", flip, "document boundaries disagree with its sequence count"),
        ("corpus.toml", Path.unlink, "No such file or directory; not a corpus directory"),
        ("corpus.toml", empty, "format = None, expected 1 or 2"),
        ("corpus.toml", lambda path: path.write_bytes(b"\xff"), "not UTF-8"),
    ],
)
def test_damaged_files_are_rejected(
    directory: Path,
    capfd: pytest.CaptureFixture[str],
    name: str,
    damage: Callable[[Path], object],
    message: str,
) -> None:
    damage(directory / name)
    with pytest.raises(DataError, match=message) as caught:
        Corpus.open(directory)
    assert str(caught.value).startswith(str(directory / name))
    del caught
    gc.collect()
    assert capfd.readouterr().err == ""  # Megatron's destructors complain after some failures


def test_unreadable_file_is_reported(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Path.open

    def refuse(path: Path, *arguments: Any, **options: Any) -> object:
        if path.name == "train.idx":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return original(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"train\.idx: Permission denied"):
        Corpus.open(directory)


def test_changed_tokens_are_detected(directory: Path) -> None:
    tokens = np.fromfile(directory / "train.bin", np.uint16)
    tokens[0] = 5  # still text: all counts agree
    tokens.tofile(directory / "train.bin")
    with pytest.raises(DataError, match=r"train\.bin: sha256 .* changed since it was written"):
        Corpus.open(directory)


def test_error_names_the_document_with_an_out_of_range_id(directory: Path) -> None:
    write_tokens(directory, [np.array([1, 2, 3]), np.array([150, 200]), np.array([7])])
    with pytest.raises(DataError, match=r"train\.bin: document 1 has token id 200, .* 0\.\.199"):
        Corpus.open(directory)


def test_empty_document_is_rejected(directory: Path) -> None:
    write_tokens(directory, [np.array([1, 2, 3]), np.array([], int), np.array([7, 7, 7])])
    with pytest.raises(DataError, match=r"train\.idx: document 1 has 0 tokens"):
        Corpus.open(directory)


def test_unexpected_dtype_is_rejected(directory: Path) -> None:
    write_tokens(directory, DOCUMENTS, dtype=np.int32)
    with pytest.raises(DataError, match=r"train\.idx: tokens are stored as int32, expected uint16"):
        Corpus.open(directory)


def test_multiple_sequences_per_document_are_rejected(directory: Path) -> None:
    builder = IndexedDatasetBuilder(str(directory / "train.bin"), dtype=np.uint16)
    builder.add_document(torch.arange(6), [3, 3])
    builder.finalize(str(directory / "train.idx"))
    with pytest.raises(DataError, match="2 sequences in 1 documents"):
        Corpus.open(directory)


def test_error_names_a_missing_codebook(directory: Path) -> None:
    replace(directory, 'codec = "none"', 'codec = "bpe"\ncodebook = "tokenizer.json"')
    with pytest.raises(DataError, match=r"tokenizer\.json: no such file, but modality text"):
        Corpus.open(directory)


def test_error_names_a_missing_split(directory: Path) -> None:
    with pytest.raises(DataError, match=r"no split 'test', expected \['train', 'validation'\]"):
        Corpus.open(directory).split("test")


def test_ids_are_checked_across_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mot_megatron.data.corpus._TOKENS_PER_CHUNK", 7)
    documents = random_documents(30, 11)
    split = write_corpus(tmp_path / "corpus", train=documents).split("train")
    assert np.array_equal(split.tokens, np.concatenate(documents))


def test_split_without_files_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.idx: no such file"):
        read_token_file(tmp_path / "absent", 10)
