"""Tokenizers of users, with special tokens of any name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from mot_megatron.data.codebooks import load_codec
from mot_megatron.data.codebooks.text import TextCodec, train_text_codebook
from mot_megatron.data.corpus import Corpus
from mot_megatron.data.documents.vocabulary import adapt_tokenizer, num_ids, read_special_names
from mot_megatron.errors import DataError
from mot_megatron.generation.segments import PromptWriter
from tests.data.documents.raw_files import TINY, build, make_items, write_jsonl

NEEDED = ("<pad>", "<bos>", "<eos>", "<boi>", "<eoi>")
SOURCE = "tokenizer.json"


@pytest.fixture(scope="module")
def tokenizer() -> bytes:
    """Return a tokenizer whose special tokens have other names, in other places."""
    content = train_text_codebook(
        ["a red square", "a blue square"] * 9, 280, ["<s>", "</s>", "[P]"]
    )
    changed = Tokenizer.from_buffer(content)
    changed.add_special_tokens([AddedToken("<boi>", special=True)])
    return changed.to_str().encode()


def test_special_tokens_are_found_or_added(tokenizer: bytes) -> None:
    names = {"<bos>": "<s>", "<eos>": "</s>", "<pad>": "[P]"}
    content, special = adapt_tokenizer(tokenizer, SOURCE, NEEDED, names)
    before, after = num_ids(tokenizer), num_ids(content)
    # <boi> was the last id; only <eoi> is new.
    assert special == {"<pad>": 2, "<bos>": 0, "<eos>": 1, "<boi>": before - 1, "<eoi>": before}
    assert after == before + 1
    unchanged, _ = adapt_tokenizer(tokenizer, SOURCE, NEEDED[:4], names)
    assert unchanged == tokenizer


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"<bos>": "<x>"}, "--special <bos>=<x>: tokenizer.json has no token '<x>'"),
        ({"<boa>": "<s>"}, "--special <boa>=<s>: expected one of <pad>, <bos>, "),
        ({"<bos>": "<s>", "<eos>": "<s>"}, "--special <eos>=<s>: <bos> is the same token"),
    ],
)
def test_wrong_names(tokenizer: bytes, names: dict[str, str], message: str) -> None:
    with pytest.raises(DataError) as raised:
        adapt_tokenizer(tokenizer, SOURCE, NEEDED, names)
    assert str(raised.value).startswith(message)


def test_no_tokenizer() -> None:
    with pytest.raises(DataError, match=r"tokenizer.json: not a tokenizer: "):
        adapt_tokenizer(b"{}", SOURCE, NEEDED, {})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'"<bos>" = 1', "<bos> = 1, expected a token"),
        (b"<bos>", "not valid TOML"),
        (b"\xff", "not valid TOML"),
    ],
)
def test_files_of_names(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "names.toml"
    path.write_bytes(b'"<bos>" = "<s>"')
    assert read_special_names(path) == {"<bos>": "<s>"}
    path.write_bytes(content)
    with pytest.raises(DataError) as raised:
        read_special_names(path)
    assert str(raised.value).startswith(f"{path}: {message}")
    with pytest.raises(DataError, match="No such file"):
        read_special_names(tmp_path / "absent.toml")


def test_corpus_with_a_given_tokenizer(tokenizer: bytes, tmp_path: Path) -> None:
    (tmp_path / SOURCE).write_bytes(tokenizer)
    items = [item._replace(text=f"</s> {item.text}") for item in make_items(12)]
    given = replace(
        TINY,
        tokenizer=tmp_path / SOURCE,
        special=(("<bos>", "<s>"), ("<eos>", "</s>"), ("<pad>", "[P]")),
    )
    build(write_jsonl(tmp_path / "raw", items), tmp_path / "corpus", vocabulary=given)
    corpus = Corpus.open(tmp_path / "corpus")
    text = corpus.description.modalities[0]
    codec = load_codec(corpus.directory, text)
    assert isinstance(codec, TextCodec)
    assert text.size == num_ids(tokenizer) + 4  # <eoi>, <boa>, <eoa> and <en>
    for document in corpus.split("train"):
        assert (document[0], document[-1]) == (0, 1)
        assert (document == 1).sum() == 1  # "</s>" in the text is text
        assert "</s> a " in codec.decode(document[document < text.size])
    prompt = PromptWriter.of(corpus.directory, [codec], corpus.description).encode("a red")
    assert prompt[:2].tolist() == [0, corpus.description.special_tokens["<en>"]]


def test_text_that_cannot_avoid_a_special_token_is_broken(tmp_path: Path) -> None:
    """Here ``end`` is an ordinary word of the tokenizer, but was chosen to end documents."""
    words = {"a": 0, "b": 1, "end": 2, "?": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.save(str(tmp_path / SOURCE))
    path = tmp_path / "a.txt"
    path.write_text("a b\na\nb a\nb b\na a\nb\nthe end\n" * 3, encoding="utf-8")
    given = replace(TINY, tokenizer=tmp_path / SOURCE, special=(("<eos>", "end"),))
    with pytest.raises(DataError, match=r"a.txt:7: the text contains 'end', a special token of"):
        build(path, tmp_path / "corpus", vocabulary=given)
