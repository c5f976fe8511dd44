"""The grammar of documents: how a segment of a modality is opened, filled and ended.

It is derived from the description of the corpus and the codecs, so new modalities need no code
here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mot_megatron.data.codebooks.codec import Codec
from mot_megatron.data.codebooks.text import TextCodec
from mot_megatron.data.corpus import CorpusDescription, Modality
from mot_megatron.data.structure import BEGIN_DOCUMENT, END_DOCUMENT, language_token
from mot_megatron.errors import DataError

DEFAULT_LANGUAGE = "en"


@dataclass(frozen=True)
class SegmentRules:
    """The ids that may occur in a segment of one modality."""

    modality: Modality
    content: np.ndarray
    """Ids of the content, int64: the modality's range without delimiters."""
    ends: np.ndarray
    """Ids that end the segment, int64: its end token, or without one, all tokens that begin
    something else or end the document."""
    num_tokens: int | None
    """Number of content ids of an item; None if it varies."""

    @classmethod
    def of(
        cls, description: CorpusDescription, modality: Modality, codec: Codec | None
    ) -> SegmentRules:
        """Return the rules for ``modality`` of a corpus, given its codec if it has one."""
        delimiters = _delimiters(description)
        ids = np.arange(modality.first_id, modality.end_id)
        if modality.end_token is not None:
            ends = {modality.end_token}
        else:
            closing = {other.end_token for other in description.modalities}
            begin_document = description.special_tokens.get(BEGIN_DOCUMENT)
            ends = delimiters - closing - {begin_document, description.pad_token}
        return cls(
            modality,
            np.setdiff1d(ids, _array(delimiters)),
            _array(ends),
            codec.tokens_per_item if codec else None,
        )

    def open_item(self, prompt: np.ndarray) -> np.ndarray:
        """Return the content at the end of ``prompt``, which is an unfinished item, or empty."""
        other = np.flatnonzero(~np.isin(prompt, self.content))
        return prompt[other[-1] + 1 :] if other.size else prompt

    def opened(self, prompt: np.ndarray) -> np.ndarray:
        """Append the token that begins a segment, unless ``prompt`` ends within a segment."""
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
    """Encodes a user's text as the start of a document."""

    description: CorpusDescription
    codec: TextCodec

    @classmethod
    def of(
        cls, directory: Path, codecs: Iterable[Codec], description: CorpusDescription
    ) -> PromptWriter:
        """Return the writer for the corpus in ``directory``.

        Raises:
            DataError: None of ``codecs`` is for text.
        """
        for codec in codecs:
            if isinstance(codec, TextCodec):
                return cls(description, codec)
        raise DataError(f"{directory}: no modality has codec 'bpe', which encodes prompts")

    def encode(self, text: str, language: str | None = None) -> np.ndarray:
        """Encode ``text`` after the tokens for the start of a document and for the language.

        Either token is omitted if the corpus does not have it, or if ``text`` itself begins with a
        special token.

        Args:
            text: Text, which may contain special tokens.
            language: Language of the text; None for English, if the corpus has languages.

        Returns:
            Ids, [p] int64.

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
        token = language_token(language or DEFAULT_LANGUAGE)
        tags = _tags(self.description)
        if special.get(token) in tags:
            return [special[token]]
        if language is None:
            return []
        names = sorted(name.strip("<>") for name, id_ in special.items() if id_ in tags)
        raise DataError(f"language {language!r}, expected one of: {', '.join(names) or 'none'}")


def _tags(description: CorpusDescription) -> set[int]:
    """Return the special tokens that may begin a segment of a modality without a begin token."""
    tokens = set(description.special_tokens.values()) - {description.pad_token}
    tokens -= {description.special_tokens.get(name) for name in (BEGIN_DOCUMENT, END_DOCUMENT)}
    for modality in description.modalities:
        tokens -= {modality.begin_token, modality.end_token}
    return tokens


@dataclass(frozen=True)
class HeldOutPrompt:
    """A prompt to generate one segment of a held-out document from its other segments."""

    prompt: np.ndarray
    """[p] ids: the other segments, then the tokens that open the segment."""
    truth: np.ndarray
    """Ids of the true content of the segment."""


def held_out_prompt(
    description: CorpusDescription, rules: SegmentRules, document: np.ndarray
) -> HeldOutPrompt | None:
    """Move the first segment of ``rules.modality`` to the end of a document and open it there.

    Return None if the document has no such segment, or nothing else.
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
