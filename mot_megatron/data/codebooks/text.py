"""Text as byte-level BPE, which encodes any string; special tokens delimit the segments."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from mot_megatron.data.codebooks.codec import Codec, TokenIds
from mot_megatron.data.corpus import Modality
from mot_megatron.data.structure import TEXT
from mot_megatron.errors import DataError
from mot_megatron.files import read_regular_file

LARGEST_TOKENIZER_BYTES = 2**28
"""Largest tokenizer.json that is read; those of published models have up to 35 MB."""


def train_text_codebook(texts: Iterable[str], size: int, special_tokens: Sequence[str]) -> bytes:
    """Train a tokenizer.

    Args:
        texts: Texts of the training split only.
        size: Maximum number of ids including special tokens; a small corpus may give fewer.
        special_tokens: Tokens with the ids 0, 1, ... in this order. Spaces around them belong to
            them, so that a prompt ``<en> red heart <boi>`` has the ids of the corpus.

    Returns:
        The content of a tokenizer.json.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokens = [AddedToken(name, lstrip=True, rstrip=True, special=True) for name in special_tokens]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str().encode()


def read_tokenizer(path: Path) -> bytes:
    """Return the content of a tokenizer.json.

    Raises:
        DataError: The file cannot be read.
    """
    try:
        return read_regular_file(path, LARGEST_TOKENIZER_BYTES)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None


def count_ids(tokenizer: Tokenizer) -> int:
    """Return the size of the range of all ids of a tokenizer, which may have gaps."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def parse_tokenizer(content: bytes, source: str) -> Tokenizer:
    """Parse the content of a tokenizer.json, named ``source`` in errors.

    Raises:
        DataError: The content is not a tokenizer.
    """
    try:
        return Tokenizer.from_buffer(content)
    # The library raises bare Exception for all malformed files.
    except Exception as error:  # noqa: BLE001
        raise DataError(f"{source}: not a tokenizer: {error}") from None


class TextCodec(Codec):
    """Converts between ids and text."""

    kind = TEXT
    suffix = ".txt"

    def __init__(self, modality: Modality, tokenizer: Tokenizer) -> None:
        super().__init__(modality)
        self.tokenizer = tokenizer

    @classmethod
    def load(cls, path: Path, modality: Modality) -> TextCodec:
        """As ``Codec.load``."""
        return cls.parse(read_tokenizer(path), modality, str(path))

    @classmethod
    def count_codes(cls, path: Path) -> int:
        """As ``Codec.count_codes``; the ids of a tokenizer may have gaps, which count."""
        return count_ids(parse_tokenizer(read_tokenizer(path), str(path)))

    @classmethod
    def parse(cls, content: bytes, modality: Modality, source: str) -> TextCodec:
        """Build the codec from the content of a tokenizer.json, named ``source`` in errors.

        Raises:
            DataError: The content is not a tokenizer, or it has more ids than the modality.
        """
        tokenizer = parse_tokenizer(content, source)
        if tokenizer.get_vocab_size() > modality.size:
            raise DataError(
                f"{source}: {tokenizer.get_vocab_size()} ids, expected at most {modality.size}, "
                f"the size of modality {modality.name}"
            )
        return cls(modality, tokenizer)

    def encode(self, text: str) -> list[int]:
        """Encode ``text``, which may contain special tokens: ``<bos><en>red heart<boi>``.

        Raises:
            DataError: The text contains bytes that are not UTF-8.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"text {text!r}: not UTF-8 at position {error.start}") from None
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return [self.modality.first_id + id_ for id_ in ids]

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode several texts."""
        encodings = self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [[self.modality.first_id + id_ for id_ in encoding.ids] for encoding in encodings]

    def decode(self, token_ids: TokenIds, *, keep_special: bool = False) -> str:
        """Decode ids to text, without special tokens unless ``keep_special``."""
        codes = self.codes(token_ids).tolist()
        return self.tokenizer.decode(codes, skip_special_tokens=not keep_special)

    def write(self, token_ids: TokenIds, path: Path) -> None:
        """Write the text and a newline."""
        path.write_text(self.decode(token_ids) + "\n", encoding="utf-8")
