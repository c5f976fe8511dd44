"""What may stand where in a document: how a segment of a modality is opened, filled and ended.

Everything is read from the corpus's description and the codecs, so that a modality nobody has
thought of is prompted and generated like the others.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mot_megatron.data.codebooks import CODECS, Codec
from mot_megatron.data.codebooks.text import TextCodec
from mot_megatron.data.corpus import CorpusDescription, Modality
from mot_megatron.errors import DataError

BEGIN_DOCUMENT = "<bos>"
"""Special token that a document begins with, in a corpus that has it."""
END_DOCUMENT = "<eos>"
"""Special token that a document ends with, in a corpus that has it."""
DEFAULT_LANGUAGE = "en"


@dataclass(frozen=True)
class SegmentRules:
    """Which ids a segment of one modality consists of."""

    modality: Modality
    content: np.ndarray
    """int64 ids that fill the segment: the modality's range without tokens that delimit."""
    ends: np.ndarray
    """int64 ids that end the segment: its end token; without one, whatever begins something else
    or ends the document."""
    num_tokens: int | None
    """Ids of content that every item has; None where that varies."""

    @classmethod
    def of(cls, description: CorpusDescription, modality: Modality) -> SegmentRules:
        """The rules for ``modality`` of a corpus."""
        delimiters = _delimiters(description)
        ids = np.arange(modality.first_id, modality.end_id)
        if modality.end_token is not None:
            ends = {modality.end_token}
        else:
            closing = {other.end_token for other in description.modalities}
            begin_document = description.special_tokens.get(BEGIN_DOCUMENT)
            ends = delimiters - closing - {begin_document, description.pad_token}
        codec = CODECS.get(modality.codec)
        return cls(
            modality,
            np.setdiff1d(ids, _array(delimiters)),
            _array(ends),
            codec.tokens_per_item if codec else None,
        )

    def open_item(self, prompt: np.ndarray) -> np.ndarray:
        """The content at the end of ``prompt``: an item begun, empty if none is."""
        other = np.flatnonzero(~np.isin(prompt, self.content))
        return prompt[other[-1] + 1 :] if other.size else prompt

    def opened(self, prompt: np.ndarray) -> np.ndarray:
        """``prompt`` with the token that begins a segment, unless one is open at its end."""
        begin = self.modality.begin_token
        if begin is None or self.open_item(prompt).size or (prompt.size and prompt[-1] == begin):
            return prompt
        return np.append(prompt, begin)


def _delimiters(description: CorpusDescription) -> set[int]:
    tokens = set(description.special_tokens.values())
    for modality in description.modalities:
        pair = (modality.begin_token, modality.end_token)
        tokens |= {token for token in pair if token is not None}
    return tokens


def _array(ids: Iterable[int]) -> np.ndarray:
    return np.array(sorted(ids), dtype=np.int64)


@dataclass(frozen=True)
class PromptWriter:
    """Turns what a user writes into the ids of a document's beginning."""

    description: CorpusDescription
    codec: TextCodec

    @classmethod
    def of(
        cls, directory: Path, codecs: Iterable[Codec], description: CorpusDescription
    ) -> PromptWriter:
        """The writer for the corpus in ``directory``.

        Raises:
            DataError: None of ``codecs`` is for text.
        """
        for codec in codecs:
            if isinstance(codec, TextCodec):
                return cls(description, codec)
        raise DataError(f"{directory}: no modality has codec 'bpe', which prompts are encoded with")

    def encode(self, text: str, language: str | None = None) -> np.ndarray:
        """Ids [p] of ``text`` behind the token of a document's begin and that of its language.

        Each is left out where the corpus has none, and where ``text`` itself begins with a
        special token, which then stands for what is wanted.

        Args:
            text: Special tokens may stand in it.
            language: None for English, in a corpus that tells languages apart.

        Raises:
            DataError: The corpus has no such language.
        """
        special = self.description.special_tokens
        ids = self.codec.encode(text)
        if not ids or ids[0] not in special.values():
            ids = self._language(language) + ids
        begin = special.get(BEGIN_DOCUMENT)
        if begin is not None and ids[:1] != [begin]:
            ids = [begin, *ids]
        return np.array(ids, dtype=np.int64)

    def _language(self, language: str | None) -> list[int]:
        special = self.description.special_tokens
        token = f"<{language or DEFAULT_LANGUAGE}>"
        tags = _tags(self.description)
        if special.get(token) in tags:
            return [special[token]]
        if language is None:
            return []
        names = sorted(name.strip("<>") for name, id_ in special.items() if id_ in tags)
        raise DataError(f"language {language!r}, expected one of: {', '.join(names) or 'none'}")


def _tags(description: CorpusDescription) -> set[int]:
    """Special tokens that begin a segment of a modality without a begin token."""
    tokens = set(description.special_tokens.values()) - {description.pad_token}
    tokens -= {description.special_tokens.get(name) for name in (BEGIN_DOCUMENT, END_DOCUMENT)}
    for modality in description.modalities:
        tokens -= {modality.begin_token, modality.end_token}
    return tokens


@dataclass(frozen=True)
class HeldOutPrompt:
    """A document whose segment of one modality is to be generated from its other segments."""

    prompt: np.ndarray
    """[p] ids: the other segments, then what opens the segment."""
    truth: np.ndarray
    """Ids of the content that the document has there."""


def held_out_prompt(
    description: CorpusDescription, rules: SegmentRules, document: np.ndarray
) -> HeldOutPrompt | None:
    """Move a document's first segment of ``rules.modality`` to its end and open it there.

    None if the document has no such segment, or nothing else.
    """
    document = document.astype(np.int64)
    inside = np.isin(document, rules.content)
    if not inside.any():
        return None
    start = int(inside.argmax())
    end = start + int(np.append(~inside[start:], True).argmax())
    truth = document[start:end]
    opening = _array(_tags(description))
    if rules.modality.begin_token is not None:
        opening = np.array([rules.modality.begin_token])
    first = start - int(start > 0 and document[start - 1] in opening)
    after = end + int(end < len(document) and document[end] == rules.modality.end_token)
    others = np.append(document[:first], document[after:])
    if others.size and others[-1] == description.special_tokens.get(END_DOCUMENT):
        others = others[:-1]
    prompt = np.append(others, document[first:start])
    return HeldOutPrompt(prompt, truth) if prompt.size else None
