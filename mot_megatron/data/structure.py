"""The structure of a document of text, images and speech, which builders write.

A document is ``<bos>``, then its segments, then ``<eos>``. A segment is ``<language> text`` (the
language is optional), ``<boi> ids <eoi>`` or ``<boa> ids <eoa>``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mot_megatron.data.corpus import Modality

TEXT, IMAGE, SPEECH = "text", "image", "speech"
KINDS = (TEXT, IMAGE, SPEECH)
"""Names of the modalities, in the order of their indices."""
PADDING = "<pad>"
BEGIN_DOCUMENT = "<bos>"
"""Special token at the start of a document, if the corpus has it."""
END_DOCUMENT = "<eos>"
"""Special token at the end of a document, if the corpus has it."""
BRACKETS = {IMAGE: ("<boi>", "<eoi>"), SPEECH: ("<boa>", "<eoa>")}
"""Special tokens before and after the segments of a modality."""
CODECS = {
    TEXT: ("bpe", "tokenizer.json"),
    IMAGE: ("image_patches", "image.npz"),
    SPEECH: ("speech_units", "speech.npz"),
}
"""Codec and name of the codebook file of each modality, unless others are chosen."""


SOURCES_FILE = "sources.json"
"""File of a corpus from raw files: what each source file contributed."""


class Piece(NamedTuple):
    """The content of a segment."""

    modality: Modality
    ids: np.ndarray
    """[n] ids of the whole vocabulary."""
    language: str | None = None
    context: bool = False
    """Whether it is context only: nothing is trained to predict it or the tokens around it."""


def special_tokens(kinds: Iterable[str], languages: Iterable[str]) -> list[str]:
    """Return the names of the special tokens of a corpus with these modalities and languages."""
    brackets = [token for kind in kinds for token in BRACKETS.get(kind, ())]
    return [PADDING, BEGIN_DOCUMENT, END_DOCUMENT, *brackets, *map(language_token, languages)]


def language_token(language: str) -> str:
    """Return the special token that precedes text in ``language``."""
    return f"<{language}>"


def modalities_of(
    sizes: Mapping[str, int],
    special: Mapping[str, int],
    codecs: Mapping[str, tuple[str, str]] = CODECS,
) -> list[Modality]:
    """Return the modalities of a corpus.

    Args:
        sizes: Number of ids of each modality, in the order of their ranges.
        special: Ids of the special tokens.
        codecs: Codec and name of the codebook file of each modality.
    """
    modalities = []
    first_id = 0
    for kind, size in sizes.items():
        begin, end = (
            (special[token] for token in BRACKETS[kind]) if kind in BRACKETS else (None,) * 2
        )
        codec, codebook = codecs[kind]
        modalities.append(
            Modality.model_validate(
                {
                    "name": kind,
                    "first_id": first_id,
                    "size": size,
                    "codec": codec,
                    "codebook": codebook,
                    "begin_token": begin,
                    "end_token": end,
                }
            )
        )
        first_id += size
    return modalities


def assemble(pieces: Sequence[Piece], special: Mapping[str, int]) -> np.ndarray:
    """Return the ids of a document, [n] int64; see ``assemble_with_context``."""
    return assemble_with_context(pieces, special)[0]


def assemble_with_context(
    pieces: Sequence[Piece], special: Mapping[str, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of a document, [n] int64, and which are context only, [n] bool.

    Args:
        pieces: Its segments in order; those without ids are left out.
        special: Ids of the special tokens. Without ``<bos>`` or ``<eos>``, the document has none.
    """
    parts: list[Sequence[int] | np.ndarray] = []
    context: list[bool] = []
    for modality, ids, language, is_context in pieces:
        if not len(ids):
            continue
        before = modality.begin_token
        if language is not None:
            before = special[language_token(language)]
        parts += [[before] if before is not None else [], ids]
        parts.append([modality.end_token] if modality.end_token is not None else [])
        context += [is_context] * 3
    ends = [[special[name]] if name in special else [] for name in (BEGIN_DOCUMENT, END_DOCUMENT)]
    whole = [ends[0], *parts, ends[1]]
    lengths = [len(part) for part in whole]
    return (
        np.concatenate([np.asarray(part, dtype=np.int64) for part in whole]),
        np.repeat([False, *context, False], lengths),
    )
