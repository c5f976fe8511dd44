"""Rows of the embedding follow tokens, and new rows have the source's statistics."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mot_megatron.conversion.huggingface.vocabulary import Rows, match_rows
from mot_megatron.data.codebooks.text import train_text_codebook
from mot_megatron.data.corpus import Corpus
from tests.small_corpus import SPECIAL, TEXT_SIZE, VOCAB_SIZE, make_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def test_by_id_without_a_tokenizer(tmp_path: Path, corpus: Corpus) -> None:
    rows = match_rows(tmp_path, 100, corpus, 384)
    assert rows.source.tolist() == [*range(100), *[-1] * 284]
    assert rows.num_new == 284
    assert match_rows(tmp_path, 1000, corpus, 384).source.tolist() == list(range(384))


def test_by_token_with_two_tokenizers(tmp_path: Path, corpus: Corpus) -> None:
    """A tokenizer that was trained on other words has other ids for the same tokens."""
    other = train_text_codebook(["a green house", "a red tree"], TEXT_SIZE, SPECIAL[3:])
    (tmp_path / "tokenizer.json").write_bytes(other)
    ours = json.loads((corpus.directory / "text.json").read_text())["model"]["vocab"]
    theirs = json.loads(other)["model"]["vocab"]
    rows = match_rows(tmp_path, TEXT_SIZE, corpus, 384)
    common = ours.keys() & theirs.keys()
    assert len(common) > 200
    assert any(ours[token] != theirs[token] for token in common)
    assert ours.keys() - theirs.keys()
    for token, id_ in ours.items():
        assert rows.source[id_] == theirs.get(token, -1), token
    assert (rows.source[TEXT_SIZE:] == -1).all()
    assert rows.num_left_out == TEXT_SIZE - len(common)
    assert "by the tokens" in rows.rule


def test_new_rows_have_the_statistics_of_their_columns() -> None:
    generator = torch.Generator().manual_seed(1)
    scale, shift = torch.tensor([0.1, 1.0, 5.0]), torch.tensor([0.0, -2.0, 30.0])
    matrix = torch.randn(500, 3, generator=generator) * scale + shift
    source = np.concatenate((np.arange(10), np.full(4000, -1), [499]))
    rows = Rows(source, 500, "test")
    assert rows.num_left_out == 500 - 11
    resized = rows.resized(matrix, "embedding", seed=3)
    assert torch.equal(resized[:10], matrix[:10])
    assert torch.equal(resized[-1], matrix[499])
    new = resized[10:-1]
    assert len(new.unique(dim=0)) == 4000
    torch.testing.assert_close(new.mean(0), matrix.mean(0), rtol=0, atol=0.3)
    torch.testing.assert_close(new.std(0), matrix.std(0), rtol=0.1, atol=0)
    assert torch.equal(resized, rows.resized(matrix, "embedding", seed=3))
    assert not torch.equal(resized, rows.resized(matrix, "embedding", seed=4))
    assert not torch.equal(resized, rows.resized(matrix, "head", seed=3))
    assert VOCAB_SIZE <= 384
