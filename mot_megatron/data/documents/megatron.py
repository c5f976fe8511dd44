"""A corpus around existing token files of Megatron, which are linked, not copied."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mot_megatron.data.codebooks.text import parse_tokenizer, read_tokenizer
from mot_megatron.data.documents.vocabulary import adapt_tokenizer, num_ids
from mot_megatron.data.structure import (
    BEGIN_DOCUMENT,
    CODECS,
    END_DOCUMENT,
    PADDING,
    TEXT,
    modalities_of,
)
from mot_megatron.data.writer import CorpusWriter

BUILDER = "mot_megatron.data.documents.megatron 1"
_SUFFIXES = (".bin", ".idx")


def wrap_token_files(
    prefixes: Mapping[str, Path], output: Path, tokenizer: Path, names: Mapping[str, str]
) -> None:
    """Write a corpus of text whose token files are symbolic links to existing ones.

    Args:
        prefixes: Path of the .bin and .idx of each split, with or without one of these suffixes.
        output: Folder of the corpus, which must be new or empty.
        tokenizer: The tokenizer.json that made the ids.
        names: Its token for special tokens of the corpus that it calls otherwise, for example
            ``<eos>`` -> ``<|endoftext|>``. The corpus has those that are named here or have the
            same name there, and ``<pad>``, which is added if the tokenizer lacks it.

    Raises:
        DataError: The output exists, the tokenizer cannot be used, or the files have another
            layout: several sequences per document, another dtype, or ids that the tokenizer lacks.
    """
    content = read_tokenizer(tokenizer)
    known = parse_tokenizer(content, str(tokenizer))
    optional = [
        name
        for name in (BEGIN_DOCUMENT, END_DOCUMENT)
        if name in names or known.token_to_id(name) is not None
    ]
    adapted, special = adapt_tokenizer(content, str(tokenizer), [PADDING, *optional], names)
    writer = CorpusWriter(
        directory=output,
        name=output.name,
        builder=BUILDER,
        seed=0,
        modalities=modalities_of({TEXT: num_ids(adapted)}, special),
        pad_token=special[PADDING],
        special_tokens=special,
    )
    with writer:
        writer.add_file(CODECS[TEXT][1], adapted)
        for split, prefix in prefixes.items():
            writer.link(split, prefix.with_suffix("") if prefix.suffix in _SUFFIXES else prefix)
