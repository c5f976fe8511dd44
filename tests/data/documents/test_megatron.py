"""Existing token files of Megatron become a corpus without being copied."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from mot_megatron.data.codebooks import load_codec
from mot_megatron.data.codebooks.text import train_text_codebook
from mot_megatron.data.corpus import Corpus
from mot_megatron.data.documents.megatron import wrap_token_files
from mot_megatron.errors import DataError

DOCUMENTS = [[5, 6, 7, 1], [8, 1], [9, 10, 1]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_bytes(train_text_codebook(["a"], 270, ["<unk>", "<end>"]))
    return path


def write(prefix: Path, documents: Sequence[Sequence[int]], dtype: type, parts: int = 1) -> Path:
    """Write token files; each document is one sequence, or one per token if ``parts`` is more."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for ids in documents:
        lengths = [len(ids)] if parts == 1 else [1] * len(ids)
        builder.add_document(np.array(ids), lengths)  # pyright: ignore[reportArgumentType]
    builder.finalize(f"{prefix}.idx")
    return prefix


def test_files_are_linked(tokenizer: Path, tmp_path: Path) -> None:
    prefix = write(tmp_path / "mine_text_document", DOCUMENTS, np.uint16)
    held_out = write(tmp_path / "other", DOCUMENTS[:1], np.uint16)
    prefixes = {"train": prefix.with_suffix(".bin"), "validation": held_out}
    wrap_token_files(prefixes, tmp_path / "corpus", tokenizer, {"<eos>": "<end>"})
    corpus = Corpus.open(tmp_path / "corpus")
    assert [ids.tolist() for ids in corpus.split("train")] == DOCUMENTS
    assert (tmp_path / "corpus" / "train.bin").readlink() == tmp_path / "mine_text_document.bin"
    (text,) = corpus.description.modalities
    # 2 special tokens and 256 bytes; <pad> is added, and no <bos>, since no document begins so.
    assert corpus.description.special_tokens == {"<pad>": 258, "<eos>": 1}
    assert text.size == 259
    assert load_codec(corpus.directory, text)
    assert corpus.description.splits["train"].tokens_per_modality == {"text": 9}


@pytest.mark.parametrize(
    ("documents", "dtype", "parts", "message"),
    [
        (DOCUMENTS, np.int32, 1, "tokens are stored as int32, expected uint16"),
        (DOCUMENTS, np.uint16, 2, "9 sequences in 3 documents, expected one sequence per document"),
        ([[1, 259]], np.uint16, 1, "token id 259, expected 0..258"),
        ([[1], []], np.uint16, 1, "document 1 has 0 tokens, expected at least one"),
    ],
)
def test_other_layouts_are_refused(
    tokenizer: Path,
    tmp_path: Path,
    documents: Sequence[Sequence[int]],
    dtype: type,
    parts: int,
    message: str,
) -> None:
    prefix = write(tmp_path / "mine", documents, dtype, parts)
    with pytest.raises(DataError) as raised:
        wrap_token_files({"train": prefix}, tmp_path / "corpus", tokenizer, {})
    assert message in str(raised.value)
    assert str(prefix) in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.bin", "mine.idx"]


def test_missing_files(tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent.idx: no such file"):
        wrap_token_files({"train": tmp_path / "absent"}, tmp_path / "corpus", tokenizer, {})
