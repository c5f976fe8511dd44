"""Corpora on which training is impossible are errors before training starts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mot_megatron.data.corpus import Corpus
from mot_megatron.data.writer import CorpusWriter
from mot_megatron.errors import DataError
from mot_megatron.train.preflight import check_codecs, check_documents
from mot_megatron.train.session import resolve_config
from tests.small_runs import MODALITIES, small_config


def corpus_of(directory: Path, train: list[list[int]], validation: list[list[int]]) -> Corpus:
    with CorpusWriter(
        directory=directory, name="c", builder="tests 1", seed=0, modalities=MODALITIES, pad_token=0
    ) as writer:
        for split, documents in (("train", train), ("validation", validation)):
            for ids in documents:
                names = [
                    next(m.name for m in MODALITIES if m.first_id <= id_ < m.end_id) for id_ in ids
                ]
                pairs = zip(names, ids, strict=True)
                writer.add(split, [(name, [id_]) for name, id_ in pairs])
    return Corpus.open(directory)


@pytest.mark.parametrize(
    ("train", "validation", "overrides", "message"),
    [
        ([[1], [2]], [[1, 2]], [], "every document of split train has a single token"),
        ([[1, 2]], [[1], [101]], [], "every document of split validation has a single token"),
        (
            [[1, 101]],
            [[1, 2]],
            ["model.modalities.text.loss_weight=0", "model.modalities.speech.loss_weight=0"],
            "split validation has no token of a modality whose model.modalities.NAME.loss_weight is"
            " above 0 (image)",
        ),
    ],
)
def test_corpus_with_nothing_to_predict_is_an_error(
    tmp_path: Path,
    train: list[list[int]],
    validation: list[list[int]],
    overrides: list[str],
    message: str,
) -> None:
    corpus = corpus_of(tmp_path / "corpus", train, validation)
    config = resolve_config(small_config(corpus.directory, overrides), corpus)
    with pytest.raises(DataError, match=re.escape(message)):
        check_documents(config, corpus)


def test_corpus_of_context_alone_is_an_error(tmp_path: Path) -> None:
    with CorpusWriter(
        directory=tmp_path / "c", name="c", builder="tests 1", seed=0, modalities=MODALITIES,
        pad_token=0,
    ) as writer:  # fmt: skip
        writer.add("train", [("text", [1, 2]), ("text", [3])], context={0})
        writer.add("validation", [("text", [1, 2])], context={0})
    corpus = Corpus.open(tmp_path / "c")
    config = resolve_config(small_config(corpus.directory, []), corpus)
    message = (
        "split validation has no label, but only context, of a modality whose model.modalities"
    )
    with pytest.raises(DataError, match=message):
        check_documents(config, corpus)


def test_codecs_are_imported_before_training(tmp_path: Path) -> None:
    text = MODALITIES[0].model_copy(update={"codec": "absent_module:Mine", "codebook": "x.txt"})
    with CorpusWriter(
        directory=tmp_path / "c", name="c", builder="tests 1", seed=0,
        modalities=[text, *MODALITIES[1:]], pad_token=0,
    ) as writer:  # fmt: skip
        writer.add_file("x.txt", b"")
        writer.add("train", [("text", [1, 2])])
    corpus = Corpus.open(tmp_path / "c")
    with pytest.raises(DataError, match="codec 'absent_module:Mine': module absent_module cannot"):
        check_codecs(corpus)
