"""The interface of codecs, which turn text, pictures or sound into ids and back.

*Ids* are those of the whole vocabulary, as in the corpus; *codes* count from 0 within the range of
the modality. A codec for pictures or sound implements codes, and the base class converts them.
"""

from __future__ import annotations

import wave
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from mot_megatron.data.corpus import Modality
from mot_megatron.data.structure import IMAGE, SPEECH
from mot_megatron.errors import DataError

TokenIds = Sequence[int] | np.ndarray


class Codec(ABC):
    """Decodes the ids of one modality."""

    kind: ClassVar[str]
    """Kind of the segments that it encodes: text, image or speech."""
    suffix: ClassVar[str]
    """File name suffix for ``write``."""

    def __init__(self, modality: Modality) -> None:
        self.modality = modality

    @property
    def row_length(self) -> int:
        """Distance, in tokens, to the second neighbor that helps most to predict a token.

        It is 2 for a sequence. For a raster it is the number of tokens in a row, since the token
        above helps more than the one two to the left.
        """
        return 2

    @property
    def tokens_per_item(self) -> int | None:
        """Number of ids of an item; None if it varies."""
        return None

    @classmethod
    @abstractmethod
    def load(cls, path: Path, modality: Modality) -> Codec:
        """Read the codebook file.

        Every rank of a training job calls this, and most never encode or decode: what is large or
        slow should be read when it is first used.

        Raises:
            DataError: The file is missing, is not a codebook of this kind, or has another size than
                the modality.
        """

    @classmethod
    @abstractmethod
    def count_codes(cls, path: Path) -> int:
        """Return the number of codes of a codebook file, the size of its modality.

        Raises:
            DataError: As ``load``.
        """

    @abstractmethod
    def decode(self, token_ids: TokenIds) -> Any:
        """Decode one item.

        Raises:
            DataError: An id is outside the modality's range, or the number of ids is invalid.
        """

    @abstractmethod
    def write(self, token_ids: TokenIds, path: Path) -> None:
        """Decode one item to a file with the codec's suffix.

        Raises:
            DataError: As ``decode``.
        """

    def codes(self, token_ids: TokenIds) -> np.ndarray:
        """Return the positions of ids within the modality's range, [n] int64.

        Raises:
            DataError: An id is outside the range.
        """
        ids = np.asarray(token_ids, dtype=np.int64)
        first, end = self.modality.first_id, self.modality.end_id
        wrong = np.flatnonzero((ids < first) | (ids >= end))
        if wrong.size:
            raise DataError(
                f"token id {ids[wrong[0]]} at position {wrong[0]} is not of modality "
                f"{self.modality.name}, expected {first}..{end - 1}"
            )
        return ids - first


class PictureCodec(Codec):
    """Converts between square pictures of one size and a fixed number of ids in reading order.

    Shapes: n pictures of p x p pixels, and of g x g codes.
    """

    kind = IMAGE
    suffix = ".png"
    pixels: int
    """p, width and height of a picture."""
    grid: int
    """g, codes per row and column."""

    @abstractmethod
    def encode_pictures(self, pictures: np.ndarray) -> np.ndarray:
        """Encode pictures [n, p, p, 3] uint8, n >= 1, to codes [n, g * g] int64."""

    @abstractmethod
    def decode_codes(self, codes: np.ndarray) -> np.ndarray:
        """Decode codes [n, g * g] int64, n >= 1, to pictures [n, p, p, 3] uint8."""

    @property
    def row_length(self) -> int:
        """As ``Codec.row_length``."""
        return self.grid

    @property
    def tokens_per_item(self) -> int:
        """As ``Codec.tokens_per_item``."""
        return self.grid * self.grid

    def encode(self, pictures: np.ndarray) -> np.ndarray:
        """Encode pictures [n, p, p, 3] uint8 to ids [n, g * g] int64."""
        if not len(pictures):
            return np.empty((0, self.tokens_per_item), np.int64)
        return self.encode_pictures(pictures) + self.modality.first_id

    def decode(self, token_ids: TokenIds) -> np.ndarray:
        """Decode the ids of one picture to uint8 [p, p, 3]."""
        codes = self.codes(token_ids)
        if len(codes) != self.tokens_per_item:
            raise DataError(
                f"a picture of {len(codes)} tokens, expected exactly {self.tokens_per_item}"
            )
        return self.decode_codes(codes[None])[0]

    def write(self, token_ids: TokenIds, path: Path) -> None:
        """Write the picture as a .png."""
        Image.fromarray(self.decode(token_ids)).save(path)


class SoundCodec(Codec):
    """Converts between sound and a number of ids that depends on its length.

    Shapes: n samples, u codes.
    """

    kind = SPEECH
    suffix = ".wav"
    sample_rate: int
    """Samples per second, of one channel."""
    shortest_seconds: ClassVar[float] = 0.2
    """Shortest sound that can be encoded."""

    @abstractmethod
    def encode_samples(self, samples: np.ndarray) -> np.ndarray:
        """Encode samples [n] float32, at least ``shortest_seconds``, to codes [u] int64, u >= 1."""

    @abstractmethod
    def decode_codes(self, codes: np.ndarray) -> np.ndarray:
        """Decode codes [u] int64, u >= 1, to samples [n] float32 in -1..1."""

    def encode(self, samples: np.ndarray) -> np.ndarray:
        """Encode samples [n] float32 to ids [u] int64.

        Raises:
            DataError: The sound is too short.
        """
        if len(samples) < self.shortest_seconds * self.sample_rate:
            raise DataError(f"a sound shorter than {self.shortest_seconds:g} s")
        return self.encode_samples(samples) + self.modality.first_id

    def decode(self, token_ids: TokenIds) -> np.ndarray:
        """Decode at least one id to samples [n] float32 in -1..1."""
        codes = self.codes(token_ids)
        if not len(codes):
            raise DataError("speech of 0 tokens, expected at least 1")
        return self.decode_codes(codes)

    def write(self, token_ids: TokenIds, path: Path) -> None:
        """Write the sound as a .wav."""
        write_sound(self.decode(token_ids), self.sample_rate, path)


def write_sound(samples: np.ndarray, rate: int, path: Path) -> None:
    """Write [n] samples in -1..1 at ``rate`` Hz as a 16-bit mono .wav."""
    with wave.open(str(path), "wb") as stream:
        stream.setnchannels(1)
        stream.setsampwidth(2)
        stream.setframerate(rate)
        stream.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
