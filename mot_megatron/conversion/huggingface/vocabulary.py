"""Which row of a foreign embedding each token of a corpus gets, and what new rows contain.

A row is copied from the source's row of the same token. If the source folder has a corpus of the
same vocabulary (an export of this program), or if one of both sides has no tokenizer, that is the
row with the same id; otherwise both tokenizers tell it. Every other row is new: each of its
elements is drawn from the normal distribution with the mean and the standard deviation of that
column of the source's matrix.

Letters: V rows of the new matrix, h hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mot_megatron.data.codebooks import load_codec
from mot_megatron.data.codebooks.text import TextCodec
from mot_megatron.data.corpus import DESCRIPTION_FILE, Corpus, Modality
from mot_megatron.model.initialization import initial_values

TOKENIZER_FILE = "tokenizer.json"
_NEW = -1


@dataclass(frozen=True)
class Rows:
    """The origin of every row of a new vocabulary matrix."""

    source: np.ndarray
    """[V] int64: row of the source's matrix, or -1 for a new row."""
    source_rows: int
    """Rows of the source's matrix."""
    rule: str
    """How they were matched, for people."""

    @property
    def num_new(self) -> int:
        """Number of new rows."""
        return int((self.source == _NEW).sum())

    @property
    def num_left_out(self) -> int:
        """Number of the source's rows that no row of the new matrix copies."""
        return self.source_rows - len(np.unique(self.source[self.source != _NEW]))

    def resized(self, matrix: torch.Tensor, name: str, seed: int) -> torch.Tensor:
        """Return the new matrix, [V, h] in fp32; ``name`` and ``seed`` determine the new rows."""
        rows = torch.from_numpy(self.source)
        resized = torch.empty(len(rows), matrix.shape[1])
        kept = rows != _NEW
        resized[kept] = matrix.index_select(0, rows[kept]).float()
        if not self.num_new:
            return resized
        std, mean = torch.std_mean(matrix.float(), dim=0, correction=0)
        drawn = initial_values(f"{name}/new", (self.num_new, matrix.shape[1]), seed, 1.0)
        resized[~kept] = drawn.mul_(std).add_(mean)
        return resized


def match_rows(directory: Path, source_rows: int, corpus: Corpus, num_rows: int) -> Rows:
    """Match the tokens of ``corpus`` to those of a source.

    Args:
        directory: Folder of the source.
        source_rows: Rows of its embedding.
        corpus: The corpus of the new run.
        num_rows: Rows of the new embedding.

    Raises:
        DataError: A tokenizer, or the corpus in the source's folder, cannot be read.
    """
    text = [m for m in corpus.description.modalities if m.codec == "bpe"]
    path = directory / TOKENIZER_FILE
    if _same_vocabulary(directory, corpus):
        return _by_id(source_rows, num_rows, "both have the same vocabulary")
    if not text or not path.is_file():
        return _by_id(source_rows, num_rows, "there is no pair of tokenizers to compare")
    whole = Modality(name="source", first_id=0, size=source_rows, codec="bpe", codebook=path.name)
    theirs = TextCodec.load(path, whole).tokenizer.get_vocab()
    rows = np.full(num_rows, _NEW, dtype=np.int64)
    for modality in text:
        codec = load_codec(corpus.directory, modality)
        assert isinstance(codec, TextCodec)
        for token, id_ in codec.tokenizer.get_vocab().items():
            rows[modality.first_id + id_] = theirs.get(token, _NEW)
    return Rows(rows, source_rows, f"by the tokens of {path} and of the corpus's tokenizer")


def _same_vocabulary(directory: Path, corpus: Corpus) -> bool:
    if not (directory / DESCRIPTION_FILE).is_file():
        return False
    return Corpus.open_vocabulary(directory).vocabulary_digest == corpus.vocabulary_digest


def _by_id(source_rows: int, num_rows: int, reason: str) -> Rows:
    ids = np.arange(num_rows)
    rows = np.where(ids < source_rows, ids, _NEW)
    return Rows(rows, source_rows, f"by id, because {reason}")
