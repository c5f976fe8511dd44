"""The vocabulary of a corpus: codebooks trained on a sample, a given tokenizer, or another corpus.

The codebook files lie in a folder, from which worker processes load them.
"""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer

from mot_megatron.data.codebooks import codec_class, load_codec
from mot_megatron.data.codebooks.codec import Codec
from mot_megatron.data.codebooks.image import (
    PATCH_PIXELS,
    PICTURE_PIXELS,
    PatchCodec,
    train_image_codebook,
)
from mot_megatron.data.codebooks.speech import UnitCodec, train_speech_codebook
from mot_megatron.data.codebooks.text import (
    TextCodec,
    count_ids,
    parse_tokenizer,
    train_text_codebook,
)
from mot_megatron.data.corpus import Corpus, Modality
from mot_megatron.data.documents.sample import Sample
from mot_megatron.data.structure import (
    CODECS,
    IMAGE,
    KINDS,
    PADDING,
    SPEECH,
    TEXT,
    modalities_of,
    special_tokens,
)
from mot_megatron.errors import DataError
from mot_megatron.files import read_regular_file

_FILE = "vocabulary.json"


@dataclass(frozen=True)
class Vocabulary:
    """Modalities, special tokens and the folder of the codebooks."""

    directory: Path
    modalities: tuple[Modality, ...]
    special_tokens: tuple[tuple[str, int], ...]
    pad_token: int

    @property
    def special(self) -> dict[str, int]:
        """Ids of the special tokens."""
        return dict(self.special_tokens)

    @property
    def kinds(self) -> dict[str, Modality]:
        """The modality of each kind of segment that can be encoded."""
        with_codec = [modality for modality in self.modalities if modality.codebook is not None]
        by_kind = {codec_class(each.codec).kind: each for each in reversed(with_codec)}
        return {kind: by_kind[kind] for kind in KINDS if kind in by_kind}

    def load_codecs(self) -> dict[str, Codec]:
        """Load the codec of each kind.

        Raises:
            DataError: A codebook cannot be used.
        """
        return {kind: load_codec(self.directory, modality) for kind, modality in self.kinds.items()}

    def save(self, files: Mapping[str, bytes | Path]) -> None:
        """Write or copy the codebooks, and last write the description, into the folder."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            if isinstance(content, Path):
                shutil.copyfile(content, self.directory / name)
            else:
                (self.directory / name).write_bytes(content)
        described = {
            "modalities": [modality.model_dump() for modality in self.modalities],
            "special_tokens": self.special,
            "pad_token": self.pad_token,
        }
        unfinished = self.directory / f"{_FILE}.tmp"
        unfinished.write_text(json.dumps(described), encoding="utf-8")
        unfinished.replace(self.directory / _FILE)

    @classmethod
    def load(cls, directory: Path) -> Vocabulary | None:
        """Read a folder that ``save`` has written; None if it is absent or unfinished."""
        path = directory / _FILE
        if not path.is_file():
            return None
        described = json.loads(path.read_text(encoding="utf-8"))
        return cls(
            directory,
            tuple(Modality.model_validate(each) for each in described["modalities"]),
            tuple(described["special_tokens"].items()),
            described["pad_token"],
        )


@dataclass(frozen=True)
class GivenCodebook:
    """A codebook that is used as it is."""

    codec: str
    """A registered name, or ``module:Class``."""
    path: Path

    def load(self, kind: str) -> Codec:
        """Load the codec, for a vocabulary of its own codes alone.

        Raises:
            DataError: The codec or its file cannot be used, or is for another kind of segments.
        """
        found = codec_class(self.codec)
        if found.kind != kind:
            raise DataError(f"codec {self.codec!r} is for {found.kind}, expected one for {kind}")
        size = found.count_codes(self.path)
        modality = Modality(
            name=kind, first_id=0, size=size, codec=self.codec, codebook=self.file_name(kind)
        )
        return found.load(self.path, modality)

    def file_name(self, kind: str) -> str:
        """Return the name of the file in a corpus."""
        return kind + self.path.suffix


@dataclass(frozen=True)
class Training:
    """How codebooks are trained."""

    sizes: tuple[tuple[str, int], ...]
    """Number of ids of each modality that the corpus has, text first."""
    seed: int
    pixels: int = PICTURE_PIXELS
    """Width and height of a picture."""
    patch: int = PATCH_PIXELS
    """Width and height of a patch."""
    given: Mapping[str, GivenCodebook] = field(default_factory=dict)
    """Codebooks of modalities that are not trained."""
    tokenizer: bytes | None = None
    """Content of a tokenizer.json to use instead of training one."""
    tokenizer_name: str = ""
    """Its name for messages."""
    names: tuple[tuple[str, str], ...] = ()
    """Token of that tokenizer for special tokens of the corpus that it calls otherwise."""


def train_vocabulary(
    directory: Path, sample: Sample, training: Training, languages: Sequence[str]
) -> Vocabulary:
    """Train the codebooks and write them into ``directory``.

    Raises:
        DataError: There is too little data for a codebook, or the tokenizer cannot be used.
    """
    sizes = dict(training.sizes)
    special_names = special_tokens(sizes, languages)
    if training.tokenizer is None:
        special = {name: index for index, name in enumerate(special_names)}
        content = train_text_codebook(sample.texts, sizes[TEXT], special_names)
    else:
        content, special = adapt_tokenizer(
            training.tokenizer, training.tokenizer_name, special_names, dict(training.names)
        )
        sizes[TEXT] = num_ids(content)
    chosen = {kind: (each.codec, each.file_name(kind)) for kind, each in training.given.items()}
    modalities = modalities_of(sizes, special, {**CODECS, **chosen})
    files: dict[str, bytes | Path] = {CODECS[TEXT][1]: content}
    for modality in modalities:
        assert modality.codebook is not None
        if modality.name == TEXT:
            TextCodec.parse(content, modality, "--text-vocabulary")
        elif modality.name in training.given:
            files[modality.codebook] = training.given[modality.name].path
        elif modality.name == IMAGE:
            files[modality.codebook] = _train_image(modality, sample, training)
        else:
            assert modality.name == SPEECH
            files[modality.codebook] = _train_speech(modality, sample, training.seed)
    vocabulary = Vocabulary(directory, tuple(modalities), tuple(special.items()), special[PADDING])
    vocabulary.save(files)
    return vocabulary


def _train_image(modality: Modality, sample: Sample, training: Training) -> bytes:
    shape = (-1, training.pixels, training.pixels, 3)
    pictures = np.array(sample.pictures, dtype=np.uint8).reshape(shape)
    centroids = train_image_codebook(pictures, modality.size, training.seed, training.patch)
    return PatchCodec(modality, centroids, training.pixels).save()


def _train_speech(modality: Modality, sample: Sample, seed: int) -> bytes:
    units = [sound.units for sound in sample.sounds] or [np.zeros((0, 160), np.float16)]
    centroids = train_speech_codebook(np.concatenate(units), modality.size, seed)
    mean = np.stack([sound.mean for sound in sample.sounds]).mean(axis=0)
    return UnitCodec(modality, centroids, mean.astype(np.float32)).save()


def read_special_names(path: Path) -> dict[str, str]:
    """Read a TOML file that maps special tokens of a corpus to tokens of a tokenizer.

    Raises:
        DataError: The file cannot be read, or it has a value that is not text.
    """
    try:
        names = tomllib.loads(read_regular_file(path).decode())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except ValueError as error:  # not TOML or not UTF-8
        raise DataError(f"{path}: not valid TOML: {error}") from None
    for name, token in names.items():
        if not isinstance(token, str):
            raise DataError(f"{path}: {name} = {token!r}, expected a token of the tokenizer")
    return names


def adapt_tokenizer(
    content: bytes, source: str, special_names: Sequence[str], names: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """Find the special tokens of a corpus in a tokenizer; those that it lacks are added at its end.

    Args:
        content: A tokenizer.json.
        source: Its name for messages.
        special_names: Special tokens that the corpus needs, for example ``<bos>``.
        names: The tokenizer's name for some of them, for example ``<bos>`` -> ``<s>``.

    Returns:
        The tokenizer.json with the added tokens, and the ids of the special tokens.

    Raises:
        DataError: Not a tokenizer, a name is of no special token or no token, or two special
            tokens are the same token.
    """
    tokenizer = parse_tokenizer(content, source)
    for name, token in names.items():
        if name not in special_names:
            raise DataError(
                f"--special {name}={token}: expected one of {', '.join(special_names)} before ="
            )
        if tokenizer.token_to_id(token) is None:
            raise DataError(f"--special {name}={token}: {source} has no token {token!r}")
    missing = [
        name for name in special_names if tokenizer.token_to_id(names.get(name, name)) is None
    ]
    if missing:
        added = [AddedToken(name, lstrip=True, rstrip=True, special=True) for name in missing]
        tokenizer.add_special_tokens(added)
        content = tokenizer.to_str().encode()
    ids = tokenizer.get_vocab(with_added_tokens=True)
    special = {name: ids[names.get(name, name)] for name in special_names}
    by_id: dict[int, str] = {}
    for name, id_ in special.items():
        if id_ in by_id:
            raise DataError(
                f"--special {name}={tokenizer.id_to_token(id_)}: {by_id[id_]} is the same token, "
                "expected a token for each; one that is not given is added to the tokenizer"
            )
        by_id[id_] = name
    return content, special


def num_ids(content: bytes) -> int:
    """Return the size of the range of all ids of a tokenizer.json, which may have gaps."""
    return count_ids(Tokenizer.from_buffer(content))


def copy_vocabulary(directory: Path, corpus_directory: Path) -> Vocabulary:
    """Copy the vocabulary and the codebooks of a corpus into ``directory``.

    Raises:
        DataError: The corpus cannot be opened, or it has no codec for text.
    """
    corpus = Corpus.open_vocabulary(corpus_directory)
    description = corpus.description
    names = [modality.codebook for modality in description.modalities if modality.codebook]
    files = {name: corpus_directory / name for name in names}
    vocabulary = Vocabulary(
        directory,
        description.modalities,
        tuple(description.special_tokens.items()),
        description.pad_token,
    )
    if not vocabulary.kinds:
        raise DataError(f"{corpus_directory}: no modality has a codec, with which to encode files")
    try:
        vocabulary.save(files)
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}") from None
    return vocabulary
