"""A corpus directory: tokenized documents and corpus.toml, which says what the ids mean.

This is the interface for any data; ``writer.CorpusWriter`` creates such a directory. Opening it
checks everything that training relies on, so a bad corpus fails with one line before the first
step. Ids out of range, for example, would silently be embedded as zeros.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from tqdm import tqdm

from mot_megatron.data.codec_names import NO_CODEC, CodecName
from mot_megatron.data.context import ContextCounts, check_context, context_path, open_context
from mot_megatron.data.indexed import bin_path, idx_path, read_token_file
from mot_megatron.data.intervals import NONE, mask_of
from mot_megatron.data.latents import (
    LatentDigests,
    LatentRows,
    offsets_path,
    open_latents,
    rows_path,
)
from mot_megatron.data.verification import verified_once
from mot_megatron.errors import DataError, first_problem
from mot_megatron.files import read_regular_file, regular_file_size

FORMATS = (1, 2)
"""Versions of the corpus.toml format that this code reads and writes.

2 adds continuous modalities; a corpus of tokens alone is written as 1.
"""
DESCRIPTION_FILE = "corpus.toml"
TRAIN_SPLIT = "train"
HELD_OUT_SPLIT = "validation"
LARGEST_VOCABULARY = 2**24
"""Upper bound on ``vocab_size``, far above any tokenizer's. It limits the memory of tables with one
entry per id."""
_TOKENS_PER_CHUNK = 1 << 22
_FROZEN = ConfigDict(frozen=True, extra="forbid", strict=True)
# Plain names, so that they cannot point outside of the corpus directory.
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}$")]
PrintableText = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]
"""Text without control characters, which would reach the terminal."""
LongDocuments = Literal["refuse", "split", "truncate"]
"""Values of data.long_documents."""
SplitName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,99}$")]


class Modality(BaseModel):
    """A kind of token: a contiguous range of the vocabulary, and the codec that decodes its ids."""

    model_config = _FROZEN

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    first_id: int = Field(ge=0)
    size: int = Field(ge=1)
    """Number of ids in the range."""
    codec: CodecName = NO_CODEC
    """Codec that decodes the ids: a registered name, or ``module:Class`` of a subclass of
    ``mot_megatron.data.codebooks.codec.Codec``; with "none", they cannot be decoded."""
    codebook: FileName | None = None
    """The codec's file in the corpus directory. None if and only if codec is "none"."""
    begin_token: int | None = None
    """Id placed before each segment of this modality. Lies outside this modality's own range."""
    end_token: int | None = None
    """Id placed after each segment of this modality. Lies outside this modality's own range."""
    width: int | None = Field(default=None, ge=1, le=2**16)
    """Numbers of the vector at each position of a continuous modality; None: tokens. The range of a
    continuous modality is one id, the placeholder of all its positions."""

    @property
    def end_id(self) -> int:
        """First id past the end of the range."""
        return self.first_id + self.size


class FileDigests(BaseModel):
    """SHA-256 of the two files of a split, in hexadecimal."""

    model_config = _FROZEN

    bin: str
    idx: str


class SplitCounts(BaseModel):
    """Contents of a split, counted by the writer and checked when the corpus is opened."""

    model_config = _FROZEN

    documents: int = Field(ge=1)
    tokens: int = Field(ge=1)
    tokens_per_modality: dict[str, int]
    longest_document: int = Field(ge=1)
    """Tokens of the longest document, which is the smallest usable seq_length."""
    sha256: FileDigests
    context: ContextCounts | None = None
    """Absent if every token is trained."""
    latents: dict[str, LatentDigests] = {}
    """Digests of the vectors of each continuous modality."""


class CorpusDescription(BaseModel):
    """The parsed corpus.toml."""

    model_config = _FROZEN

    format: Literal[1, 2] = 1
    name: PrintableText = Field(min_length=1)
    builder: PrintableText
    """Name and version of the program that wrote the corpus."""
    seed: int
    vocab_size: int = Field(ge=1, le=LARGEST_VOCABULARY)
    pad_token: int
    """Id for the positions of a sequence that no document occupies."""
    # strict=False, since strict validation does not convert TOML's arrays to tuples.
    modalities: tuple[Modality, ...] = Field(min_length=1, max_length=127, strict=False)
    """Modalities in the order of their indices."""
    special_tokens: dict[str, int] = {}
    splits: dict[SplitName, SplitCounts] = {}
    licences: dict[str, str] = {}
    """License of each source."""

    @property
    def continuous(self) -> dict[str, int]:
        """Width of each continuous modality, by name."""
        return {m.name: m.width for m in self.modalities if m.width is not None}

    @cached_property
    def modality_of_id(self) -> np.ndarray:
        """Modality index of each id, [vocab_size] int8."""
        sizes = [modality.size for modality in self.modalities]
        table = np.repeat(np.arange(len(sizes), dtype=np.int8), sizes)
        table.flags.writeable = False
        return table

    def check(self, source: str) -> None:
        """Check the fields against each other.

        Args:
            source: Name for error messages, for example the path of corpus.toml.

        Raises:
            DataError: Ranges are not contiguous or do not end at ``vocab_size``, a modality name
                occurs twice, a codec and its codebook do not match, a special or padding token is
                outside the vocabulary, a begin or end token is outside the vocabulary or inside
                its own modality's range, a continuous modality has several ids or one of these
                tokens, all modalities are continuous, or a split does not count every modality or
                lacks the vectors of a continuous one.
        """
        _check_ranges(self, source)
        _check_continuous(self, source)
        _check_tokens(self, source)
        names = [modality.name for modality in self.modalities]
        for split, counts in self.splits.items():
            tables = {"": counts.tokens_per_modality}
            if counts.context is not None:
                tables["context."] = counts.context.tokens_per_modality
            for table, tokens in tables.items():
                if set(tokens) != set(names):
                    raise DataError(
                        f"{source}: splits.{split}.{table}tokens_per_modality has keys "
                        f"{sorted(tokens)}, expected {sorted(names)}"
                    )


def _check_ranges(description: CorpusDescription, source: str) -> None:
    names = [modality.name for modality in description.modalities]
    if len(set(names)) < len(names):
        raise DataError(f"{source}: modalities are named {names}, expected each name once")
    next_id = 0
    for modality in description.modalities:
        if modality.first_id != next_id:
            raise DataError(
                f"{source}: modality {modality.name} has first_id = {modality.first_id}, expected "
                f"{next_id}: ranges must be contiguous"
            )
        next_id = modality.end_id
        if (modality.codebook is None) != (modality.codec == NO_CODEC):
            raise DataError(
                f"{source}: modality {modality.name} has codec = {modality.codec!r} and codebook = "
                f"{modality.codebook!r}; every codec except 'none' needs a codebook, "
                "and 'none' has none"
            )
    if next_id != description.vocab_size:
        raise DataError(
            f"{source}: vocab_size = {description.vocab_size}, expected {next_id}, the end of the "
            "last modality's range"
        )


def _check_continuous(description: CorpusDescription, source: str) -> None:
    continuous = description.continuous
    if continuous and description.format == 1:
        raise DataError(
            f"{source}: modality {next(iter(continuous))} has a width, expected format = 2"
        )
    if len(continuous) == len(description.modalities):
        raise DataError(f"{source}: all modalities have a width, expected one of tokens")
    for modality in description.modalities:
        if modality.width is not None and modality.size != 1:
            raise DataError(
                f"{source}: modality {modality.name} has width = {modality.width} and size = "
                f"{modality.size}, expected size = 1, its placeholder"
            )
    for split, counts in description.splits.items():
        if set(counts.latents) != set(continuous):
            raise DataError(
                f"{source}: splits.{split}.latents has keys {sorted(counts.latents)}, expected "
                f"{sorted(continuous)}"
            )


def _check_tokens(description: CorpusDescription, source: str) -> None:
    tokens = {"pad_token": description.pad_token}
    tokens |= {f"special_tokens.{name}": id_ for name, id_ in description.special_tokens.items()}
    for modality in description.modalities:
        for key in ("begin_token", "end_token"):
            token = getattr(modality, key)
            if token is None:
                continue
            tokens[f"{key} of modality {modality.name}"] = token
            if modality.first_id <= token < modality.end_id:
                raise DataError(
                    f"{source}: {key} of modality {modality.name} is {token}, expected an id "
                    f"outside its own range {modality.first_id}..{modality.end_id - 1}"
                )
    placeholders = {m.first_id: m.name for m in description.modalities if m.width is not None}
    for key, token in tokens.items():
        if token in placeholders:
            raise DataError(
                f"{source}: {key} is {token}, the placeholder of modality {placeholders[token]}"
            )
        if not 0 <= token < description.vocab_size:
            raise DataError(f"{source}: {key} is {token}, expected 0..{description.vocab_size - 1}")


def parse_description(text: str, source: str) -> CorpusDescription:
    """Parse and check the text of a corpus.toml.

    Args:
        text: TOML.
        source: Name for error messages, for example the path of the file.

    Raises:
        DataError: Not TOML, another format version, an unknown or missing key, a wrong type or an
            illegal value.
    """
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise DataError(f"{source}: not valid TOML: {error}") from None
    # Check this first, since another version may have other keys.
    if values.get("format") not in FORMATS:
        expected = " or ".join(map(str, FORMATS))
        raise DataError(f"{source}: format = {values.get('format')!r}, expected {expected}")
    description = describe(values, source)
    if not description.splits:
        raise DataError(f"{source}: no [splits.NAME] table, expected at least one")
    return description


def describe(values: dict[str, object], source: str) -> CorpusDescription:
    """Build and check a description from its key-value pairs.

    Raises:
        DataError: A key or value is invalid; the message names ``source`` and the first bad key.
    """
    try:
        description = CorpusDescription.model_validate(values)
    except ValidationError as error:
        raise DataError(f"{source}: {first_problem(error)}") from None
    description.check(source)
    return description


@dataclass(frozen=True)
class TokenSplit:
    """The documents of one split; indexing returns a view of one document's ids."""

    name: str
    tokens: np.ndarray
    """[tokens] uint16 or int32, all documents concatenated, memory-mapped read-only."""
    offsets: np.ndarray
    """[documents + 1] int64: start of each document, and end of the last one."""
    context: np.ndarray = field(default_factory=lambda: NONE)
    """[n, 2] int64, memory-mapped: first token and end of each run of tokens that are context only,
    sorted. Nothing is trained to predict these tokens."""

    @property
    def has_context(self) -> bool:
        """Whether some tokens are context only."""
        return len(self.context) > 0

    def context_of(self, document: int) -> np.ndarray:
        """Return which tokens of a document are context only, [length] bool."""
        begin, end = self.offsets[document : document + 2].tolist()
        return mask_of(self.context, begin, end)

    latents: Mapping[str, LatentRows] = field(default_factory=dict)
    """Vectors of each continuous modality, by name."""

    @cached_property
    def lengths(self) -> np.ndarray:
        """Number of tokens in each document, [documents] int64."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, document: int) -> np.ndarray:
        if not 0 <= document < len(self):
            raise IndexError(f"document {document} of {len(self)}")
        return self.tokens[self.offsets[document] : self.offsets[document + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[document] for document in range(len(self)))


@dataclass(frozen=True)
class Corpus:
    """An opened and checked corpus directory."""

    directory: Path
    description: CorpusDescription
    splits: dict[str, TokenSplit]
    fingerprint: str
    """SHA-256 of corpus.toml, which contains the digests of the token files."""
    long_documents: LongDocuments = "refuse"
    """What training does with documents that are longer than a sequence."""
    prepared: dict[tuple[str, int, LongDocuments], Any] = field(
        default_factory=dict, repr=False, compare=False
    )
    """Splits as training reads them, kept since long documents take time: by name, sequence length
    and ``long_documents``."""

    @classmethod
    def open(cls, directory: Path, *, once: bool = False) -> Corpus:
        """Open ``directory`` and check all files against corpus.toml and all ids.

        This reads all tokens once, which takes about 0.2 s for 10 million.

        Args:
            directory: Folder of the corpus.
            once: Do not read the tokens if a process on this machine has, and the files have not
                changed since.

        Raises:
            DataError: A file is missing, truncated or changed since it was written, corpus.toml is
                invalid or contradicts the files, or an id is outside the vocabulary.
        """
        corpus = cls.open_unchecked(directory)
        prefixes = [directory / name for name in corpus.splits]
        files = [path.name for p in prefixes for path in (bin_path(p), idx_path(p))]
        files += [context_path(p).name for p in prefixes if corpus.splits[p.name].has_context]
        files += [
            path(prefix, name).name
            for prefix in prefixes
            for name in corpus.description.continuous
            for path in (rows_path, offsets_path)
        ]
        try:
            if not once:
                corpus._check_content()
                return corpus
            with verified_once(directory, [DESCRIPTION_FILE, *files]) as is_needed:
                if is_needed:
                    corpus._check_content()
        except OSError as error:
            raise DataError(f"{error.filename}: {error.strerror}") from None
        return corpus

    @classmethod
    def open_unchecked(cls, directory: Path) -> Corpus:
        """Open ``directory`` as ``open`` does, but do not read the tokens.

        Raises:
            DataError: As ``open``, but for what only the tokens tell.
        """
        corpus = cls.open_vocabulary(directory)
        description = corpus.description
        try:
            splits = {
                name: _open_split(directory, name, description) for name in description.splits
            }
        except OSError as error:
            raise DataError(f"{error.filename}: {error.strerror}") from None
        return replace(corpus, splits=splits)

    def check_latents(self) -> None:
        """Compare the vectors of continuous modalities with their digests, which reads them all.

        ``open`` does not, because they may be a hundred times as large as the tokens.

        Raises:
            DataError: A file was changed since it was written, or cannot be read.
        """
        for split, counts in self.description.splits.items():
            for name, digests in counts.latents.items():
                path = rows_path(self.directory / split, name)
                _check_digest(path, _digest(path), digests.rows)

    def _check_content(self) -> None:
        for split in self.splits.values():
            _check_content(split, self.directory / split.name, self.description)

    @classmethod
    def open_vocabulary(cls, directory: Path) -> Corpus:
        """Open the description of the corpus in ``directory``, without its documents.

        The result has no splits. A folder with corpus.toml and the codebooks is enough.

        Raises:
            DataError: corpus.toml is missing or invalid, or a codebook is missing.
        """
        path = directory / DESCRIPTION_FILE
        try:
            content = read_regular_file(path)
            description = parse_description(content.decode("utf-8-sig"), str(path))
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; not a corpus directory?") from None
        except UnicodeDecodeError:
            raise DataError(f"{path}: not UTF-8 text") from None
        for modality in description.modalities:
            if modality.codebook and not (directory / modality.codebook).is_file():
                raise DataError(
                    f"{directory / modality.codebook}: no such file, but modality {modality.name} "
                    f"of {path} names it as its codebook"
                )
        return cls(directory, description, {}, hashlib.sha256(content).hexdigest())

    @cached_property
    def vocabulary(self) -> dict[str, Any]:
        """What the ids mean: modalities with the codebooks' digests, special and padding tokens.

        Raises:
            DataError: A codebook cannot be read.
        """
        described = self.description.model_dump(
            mode="json", include={"modalities", "special_tokens", "pad_token"}
        )
        for modality in described["modalities"]:
            if modality["width"] is None:
                del modality["width"]  # digests of tokens are older than continuous modalities
            if modality["codebook"]:
                # Equal codebooks may have other names.
                path = self.directory / modality["codebook"]
                try:
                    regular_file_size(path)
                    with path.open("rb") as file:
                        modality["codebook"] = hashlib.file_digest(file, "sha256").hexdigest()
                except OSError as error:
                    raise DataError(f"{path}: {error.strerror}") from None
        return described

    @cached_property
    def vocabulary_digest(self) -> str:
        """SHA-256 of ``vocabulary``; the same errors."""
        return hashlib.sha256(json.dumps(self.vocabulary, sort_keys=True).encode()).hexdigest()

    def description_text(self) -> str:
        """Return the text of corpus.toml.

        Raises:
            OSError: It cannot be read.
        """
        return read_regular_file(self.directory / DESCRIPTION_FILE).decode("utf-8-sig")

    def parts(self, name: str) -> tuple[TokenSplit, ...]:
        """Return the splits called ``name`` of which the data consists: one, unless it is a blend.

        Raises:
            DataError: There is no such split.
        """
        return (self.split(name),)

    def split(self, name: str) -> TokenSplit:
        """Return the split called ``name``.

        Raises:
            DataError: There is no such split.
        """
        if name not in self.splits:
            raise DataError(f"{self.directory}: no split {name!r}, expected {sorted(self.splits)}")
        return self.splits[name]


def _open_split(directory: Path, name: str, description: CorpusDescription) -> TokenSplit:
    counts = description.splits[name]
    prefix = directory / name
    tokens, offsets = read_token_file(prefix, description.vocab_size)
    context = open_context(prefix, counts.context)
    latents = {
        modality: open_latents(
            prefix,
            modality,
            width=width,
            documents=len(offsets) - 1,
            rows=counts.tokens_per_modality[modality],
        )
        for modality, width in description.continuous.items()
    }
    split = TokenSplit(name, tokens, offsets, context, latents)
    found = {
        "documents": len(split),
        "tokens": len(tokens),
        "longest_document": int(split.lengths.max()),
    }
    for key, value in found.items():
        if value != getattr(counts, key):
            raise DataError(
                f"{directory / DESCRIPTION_FILE}: splits.{name}.{key} = {getattr(counts, key)}, "
                f"but {idx_path(prefix).name} has {value}"
            )
    return split


def _check_content(split: TokenSplit, prefix: Path, description: CorpusDescription) -> None:
    counts = description.splits[split.name]
    _check_digest(idx_path(prefix), _digest(idx_path(prefix)), counts.sha256.idx)
    if counts.context is not None:
        check_context(prefix, split.context, len(split.tokens))
        digest = hashlib.sha256(split.context.tobytes())
        _check_digest(context_path(prefix), digest, counts.context.sha256)
    occurrences = np.zeros(description.vocab_size, dtype=np.int64)
    in_context = np.zeros(description.vocab_size, dtype=np.int64)
    digest = hashlib.sha256()
    starts = range(0, len(split.tokens), _TOKENS_PER_CHUNK)
    for start in tqdm(starts, desc=f"checking {split.name}", delay=5, ncols=100, leave=False):
        chunk = split.tokens[start : start + _TOKENS_PER_CHUNK]
        digest.update(chunk.data)
        if chunk.min() < 0 or chunk.max() >= description.vocab_size:
            raise _out_of_range(split, prefix, start, description.vocab_size)
        occurrences += np.bincount(chunk, minlength=description.vocab_size)
        if split.has_context:
            chosen = chunk[mask_of(split.context, start, start + len(chunk))]
            in_context += np.bincount(chosen, minlength=description.vocab_size)
    _check_modalities(bin_path(prefix), "", occurrences, counts.tokens_per_modality, description)
    if counts.context is not None:
        expected = counts.context.tokens_per_modality
        _check_modalities(context_path(prefix), "context.", in_context, expected, description)
    _check_digest(bin_path(prefix), digest, counts.sha256.bin)
    for modality in description.modalities:
        if modality.width is not None:
            path = offsets_path(prefix, modality.name)
            _check_digest(path, _digest(path), counts.latents[modality.name].offsets)
            placeholders = _occurrences(split, modality.first_id)
            split.latents[modality.name].check_documents(placeholders, path)


def _check_modalities(
    path: Path,
    table: str,
    occurrences: np.ndarray,
    expected: dict[str, int],
    description: CorpusDescription,
) -> None:
    """Check the tokens of each modality against the occurrences of each id in a file."""
    for modality in description.modalities:
        tokens = int(occurrences[modality.first_id : modality.end_id].sum())
        if tokens != expected[modality.name]:
            raise DataError(
                f"{path.parent / DESCRIPTION_FILE}: splits.{path.stem}.{table}tokens_per_modality."
                f"{modality.name} = {expected[modality.name]}, but {path.name} has {tokens}"
            )


def _occurrences(split: TokenSplit, token_id: int) -> np.ndarray:
    """Return how often an id occurs in each document, [documents] int64."""
    counts = np.zeros(len(split), dtype=np.int64)
    for start in range(0, len(split.tokens), _TOKENS_PER_CHUNK):
        chunk = split.tokens[start : start + _TOKENS_PER_CHUNK]
        places = start + np.flatnonzero(chunk == token_id)
        documents = np.searchsorted(split.offsets, places, side="right") - 1
        counts += np.bincount(documents, minlength=len(split))
    return counts


def _digest(path: Path) -> hashlib._Hash:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None


def _check_digest(path: Path, digest: hashlib._Hash, expected: str) -> None:
    if digest.hexdigest() != expected:
        raise DataError(
            f"{path}: sha256 {digest.hexdigest()[:12]}, expected {expected[:12]} according to "
            f"{DESCRIPTION_FILE}; changed since it was written?"
        )


def _out_of_range(split: TokenSplit, prefix: Path, start: int, vocab_size: int) -> DataError:
    chunk = split.tokens[start : start + _TOKENS_PER_CHUNK]
    position = start + int(np.flatnonzero((chunk < 0) | (chunk >= vocab_size))[0])
    document = int(np.searchsorted(split.offsets, position, side="right")) - 1
    return DataError(
        f"{bin_path(prefix)}: document {document} has token id {split.tokens[position]}, expected "
        f"0..{vocab_size - 1}"
    )
