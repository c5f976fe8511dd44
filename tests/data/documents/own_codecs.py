"""Codecs as a user would write them in a module of their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mot_megatron.data.codebooks.codec import PictureCodec, SoundCodec
from mot_megatron.data.corpus import Modality


class MeanGray(PictureCodec):
    """Pictures as the gray level of each quarter; the file has the number of levels."""

    pixels, grid = 48, 2

    def __init__(self, modality: Modality, levels: int) -> None:
        super().__init__(modality)
        self.levels = levels

    @classmethod
    def load(cls, path: Path, modality: Modality) -> MeanGray:
        return cls(modality, cls.count_codes(path))

    @classmethod
    def count_codes(cls, path: Path) -> int:
        return int(path.read_text())

    def encode_pictures(self, pictures: np.ndarray) -> np.ndarray:
        quarters = pictures.reshape(-1, 2, 24, 2, 24, 3).mean(axis=(2, 4, 5))
        return (quarters / 256 * self.levels).astype(np.int64).reshape(-1, 4)

    def decode_codes(self, codes: np.ndarray) -> np.ndarray:
        gray = ((codes + 0.5) / self.levels * 256).astype(np.uint8).reshape(-1, 2, 2, 1)
        return gray.repeat(24, 1).repeat(24, 2).repeat(3, 3)


class Loudness(SoundCodec):
    """Sound at 8 kHz as the loudness of each tenth of a second."""

    sample_rate = 8000
    shortest_seconds = 0.1

    @classmethod
    def load(cls, path: Path, modality: Modality) -> Loudness:
        assert path.is_file()
        return cls(modality)

    @classmethod
    def count_codes(cls, path: Path) -> int:
        assert path.is_file()
        return 10

    def encode_samples(self, samples: np.ndarray) -> np.ndarray:
        tenths = np.abs(samples[: len(samples) // 800 * 800].reshape(-1, 800)).max(1)
        return np.clip(tenths * 10, 0, 9).astype(np.int64)

    def decode_codes(self, codes: np.ndarray) -> np.ndarray:
        return ((codes + 0.5) / 10).repeat(800).astype(np.float32)


class Unrelated:
    """No codec."""
