"""Encode the documents of a shard to ids, in a file that a later run can use again."""

from __future__ import annotations

import io
import itertools
import json
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from mot_megatron.data.codebooks.codec import Codec, PictureCodec, SoundCodec
from mot_megatron.data.codebooks.text import TextCodec
from mot_megatron.data.documents.decode import (
    DecodedDocument,
    DecodedSegment,
    Fit,
    MediaFormat,
    decode_document,
)
from mot_megatron.data.documents.raw import BrokenItemError, RawDocument
from mot_megatron.data.documents.sources import Reading, Shard, read_shard
from mot_megatron.data.documents.vocabulary import Vocabulary
from mot_megatron.data.intervals import intervals_of, mask_of
from mot_megatron.data.structure import (
    IMAGE,
    TEXT,
    Piece,
    assemble_with_context,
    language_token,
)
from mot_megatron.files import write_atomically

_DOCUMENTS_PER_BATCH = 64
_PICTURES_PER_BATCH = 64


@dataclass(frozen=True)
class Broken:
    """A document that was left out."""

    where: str
    problem: str


@dataclass(frozen=True)
class EncodedShard:
    """The documents of a shard as ids of the vocabulary."""

    ids: np.ndarray
    """[tokens] int32, all documents one after the other."""
    lengths: np.ndarray
    """Tokens of each document, [documents] int64."""
    held_out: np.ndarray
    """Whether each document belongs to the validation split, [documents] bool."""
    context: np.ndarray
    """[n, 2] int64: the intervals of ``ids`` that are context only."""
    broken: tuple[Broken, ...]

    def documents(self) -> Iterator[tuple[bool, np.ndarray, np.ndarray]]:
        """Yield whether a document is held out, its ids, and which of them are context only."""
        ends = np.cumsum(self.lengths).tolist()
        for end, length, held_out in zip(ends, self.lengths.tolist(), self.held_out, strict=True):
            start = end - length
            yield bool(held_out), self.ids[start:end], mask_of(self.context, start, end)

    def save(self, path: Path) -> None:
        """Write the shard; the file is complete or absent."""
        broken = json.dumps([[each.where, each.problem] for each in self.broken]).encode()
        stream = io.BytesIO()
        np.savez(
            stream,
            ids=self.ids,
            lengths=self.lengths,
            held_out=self.held_out,
            context=self.context,
            broken=np.frombuffer(broken, np.uint8),
        )
        write_atomically(path, stream.getvalue())

    @classmethod
    def load(cls, path: Path) -> EncodedShard | None:
        """Read a shard; None if there is none, or its file is damaged."""
        try:
            with np.load(path, allow_pickle=False) as stored:
                broken = json.loads(stored["broken"].tobytes())
                return cls(
                    stored["ids"],
                    stored["lengths"],
                    stored["held_out"],
                    stored["context"],
                    tuple(Broken(where, problem) for where, problem in broken),
                )
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None


@lru_cache(maxsize=1)
def _codecs(vocabulary: Vocabulary) -> dict[str, Codec]:
    codecs = vocabulary.load_codecs()
    # Once more for a worker, now that libraries are loaded: the number of threads changes sums.
    threadpool_limits(1)
    for codec in codecs.values():
        if isinstance(codec, TextCodec):
            # "<eos>" in a text is text, not the end of the document.
            codec.tokenizer.encode_special_tokens = True
    return codecs


def encode_shard(
    shard: Shard, reading: Reading, vocabulary: Vocabulary, validation_share: float, path: Path
) -> None:
    """Encode a shard into the file ``path``.

    Raises:
        DataError: The source cannot be read; single broken documents are only listed.
    """
    codecs = _codecs(vocabulary)
    encoder = _Encoder(vocabulary, codecs, media_format(codecs.values(), reading.fit))
    documents: list[np.ndarray] = []
    context: list[np.ndarray] = []
    held_out: list[bool] = []
    broken: list[Broken] = []
    source = read_shard(shard, reading)
    while batch := list(itertools.islice(source, _DOCUMENTS_PER_BATCH)):
        decoded = []
        for document in batch:
            try:
                decoded.append(encoder.decode(document, validation_share))
            except BrokenItemError as error:
                broken.append(Broken(document.where, str(error)))
        for ids, mask in encoder.encode(decoded):
            documents.append(ids)
            context.append(mask)
        held_out += [each.document.held_out for each in decoded]
    EncodedShard(
        np.concatenate([np.empty(0, np.int32), *documents]).astype(np.int32),
        np.array([len(document) for document in documents], dtype=np.int64),
        np.array(held_out, dtype=bool),
        intervals_of(np.concatenate([np.empty(0, bool), *context])),
        tuple(broken),
    ).save(path)


def media_format(codecs: Iterable[Codec], fit: Fit) -> MediaFormat:
    """Return what pictures and sounds have to be converted to before they are encoded."""
    form = MediaFormat(fit=fit)
    for codec in codecs:
        if isinstance(codec, PictureCodec):
            form = replace(form, pixels=codec.pixels)
        elif isinstance(codec, SoundCodec):
            shortest = codec.shortest_seconds
            form = replace(form, sample_rate=codec.sample_rate, shortest_seconds=shortest)
    return form


@dataclass(frozen=True)
class _Prepared:
    """A document of which only the pictures are still to be encoded."""

    document: DecodedDocument
    ids: tuple[np.ndarray, ...]
    """Of each segment; none of a picture."""


@dataclass(frozen=True)
class _Encoder:
    vocabulary: Vocabulary
    codecs: Mapping[str, Codec]
    """By kind of segment."""
    form: MediaFormat

    def decode(self, document: RawDocument, validation_share: float) -> _Prepared:
        """Decode a document, and encode its texts and sounds.

        A text may still turn out to be broken, and many sounds need not fit into memory.
        """
        kinds, special = self.vocabulary.kinds, self.vocabulary.special
        for segment in document.segments:
            if segment.kind not in kinds:
                raise BrokenItemError(
                    f"a segment of {segment.kind}, but the corpus has only {', '.join(kinds)}; "
                    "--kinds chooses what it has"
                )
            if segment.language is not None and language_token(segment.language) not in special:
                raise BrokenItemError(
                    f"language {segment.language!r} is none of the corpus; --languages lists them"
                )
        decoded = decode_document(document, validation_share, self.form)
        ids = tuple(self._ids(segment) for segment in decoded.segments)
        kept = tuple(
            each if each.kind == IMAGE else replace(each, content="") for each in decoded.segments
        )
        return _Prepared(replace(decoded, segments=kept), ids)

    def _ids(self, segment: DecodedSegment) -> np.ndarray:
        codec = self.codecs[segment.kind]
        if isinstance(codec, TextCodec):
            assert isinstance(segment.content, str)
            return self._text(codec, segment.content)
        if isinstance(codec, SoundCodec):
            assert isinstance(segment.content, np.ndarray)
            return codec.encode(segment.content)
        return np.empty(0, np.int64)

    def _text(self, codec: TextCodec, text: str) -> np.ndarray:
        ids = np.array(codec.encode(text), dtype=np.int64)
        delimiters = np.isin(ids, [*self.vocabulary.special.values(), self.vocabulary.pad_token])
        if delimiters.any():
            token = codec.decode(ids[delimiters][:1], keep_special=True)
            raise BrokenItemError(f"the text contains {token!r}, a special token of the corpus")
        return ids

    def encode(self, documents: Sequence[_Prepared]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the ids of each document, and which of them are context only.

        Pictures are encoded many at once.
        """
        every = [segment for each in documents for segment in each.document.segments]
        pictures = self._pictures([each.content for each in every if each.kind == IMAGE])
        encoded = []
        for prepared in documents:
            pieces = [
                Piece(
                    self.vocabulary.kinds[segment.kind],
                    next(pictures) if segment.kind == IMAGE else ids,
                    segment.language if segment.kind == TEXT else None,
                    segment.context,
                )
                for segment, ids in zip(prepared.document.segments, prepared.ids, strict=True)
            ]
            encoded.append(assemble_with_context(pieces, self.vocabulary.special))
        return encoded

    def _pictures(self, pictures: Sequence[str | np.ndarray]) -> Iterator[np.ndarray]:
        codec = self.codecs.get(IMAGE)
        if not isinstance(codec, PictureCodec):
            return
        for start in range(0, len(pictures), _PICTURES_PER_BATCH):
            yield from codec.encode(np.stack(pictures[start : start + _PICTURES_PER_BATCH]))
