"""Speech as 25 codes per second: four 10 ms log-mel frames become their nearest centroid.

The mean of each utterance is removed first, so that codes depend on what is said, not on the
speaker and loudness. Decoding adds the mean of all training utterances instead.

Shapes: n samples, u units, d = 160 values of a unit.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from mot_megatron.data.codebooks.arrays import array_shapes, pack_arrays, read_arrays
from mot_megatron.data.codebooks.codec import SoundCodec
from mot_megatron.data.codebooks.kmeans import nearest_centroids, train_centroids
from mot_megatron.data.codebooks.mel import MEL_BINS, SAMPLE_RATE, log_mel, sound_of_log_mel
from mot_megatron.data.corpus import Modality
from mot_megatron.errors import DataError

FRAMES_PER_UNIT = 4
UNITS_PER_SECOND = 25
_WIDTH = FRAMES_PER_UNIT * MEL_BINS
_LEVEL = 0.05
"""Root mean square to which each utterance is normalized."""
_TRAINING_UNITS = 120_000
_SHORTEST_UNITS = 5


class SpeechFeatures(NamedTuple):
    """Features of an utterance, to be encoded."""

    units: np.ndarray
    """[u, 160], one vector per 40 ms, without the mean of the utterance."""
    mean: np.ndarray
    """[40], the mean that was removed."""


def speech_features(samples: np.ndarray) -> SpeechFeatures:
    """Compute the features of ``samples`` [n] float32 at 16 kHz; none if shorter than 0.2 s."""
    units = len(samples) * UNITS_PER_SECOND // SAMPLE_RATE
    if units < _SHORTEST_UNITS:
        return SpeechFeatures(np.zeros((0, _WIDTH), np.float16), np.zeros(MEL_BINS, np.float32))
    spectrum = log_mel(at_level(samples))
    frames = spectrum[: units * FRAMES_PER_UNIT]
    mean = frames.mean(axis=0)
    return SpeechFeatures((frames - mean).reshape(units, _WIDTH).astype(np.float16), mean)


def at_level(samples: np.ndarray) -> np.ndarray:
    """Return samples [n] float32 scaled to the level to which all utterances are normalized."""
    level = np.sqrt((samples**2).mean())
    return (samples * (_LEVEL / (level + 1e-6))).astype(np.float32)


def train_speech_codebook(features: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Train the centroids of ``UnitCodec``.

    Args:
        features: [u, 160], without utterance means, of the training split only.
        count: Number of codes.
        seed: Seed for the choice and order of training units.

    Returns:
        [count, 160] float32.

    Raises:
        DataError: There are too few units for ``count`` codes.
    """
    random = np.random.default_rng(seed)
    chosen = random.permutation(len(features))[:_TRAINING_UNITS]
    return train_centroids(features[chosen].astype(np.float32), count, seed, "speech codebook")


class UnitCodec(SoundCodec):
    """Encodes each 40 ms as its nearest centroid."""

    sample_rate = SAMPLE_RATE

    def __init__(self, modality: Modality, centroids: np.ndarray, mean: np.ndarray) -> None:
        super().__init__(modality)
        self.centroids = centroids
        self.mean = mean

    @classmethod
    def load(cls, path: Path, modality: Modality) -> UnitCodec:
        """As ``Codec.load``."""
        shapes = {"centroids": (modality.size, _WIDTH), "mean": (MEL_BINS,)}
        arrays = read_arrays(path, shapes)
        return cls(modality, arrays["centroids"], arrays["mean"])

    @classmethod
    def count_codes(cls, path: Path) -> int:
        """As ``Codec.count_codes``."""
        shapes = array_shapes(path)
        if len(shapes.get("centroids", ())) != 2:
            raise DataError(f"{path}: contains arrays of shapes {shapes}, expected centroids, mean")
        return shapes["centroids"][0]

    def save(self) -> bytes:
        """Return the content of the codebook file."""
        return pack_arrays(centroids=self.centroids, mean=self.mean)

    def encode_features(self, features: np.ndarray) -> np.ndarray:
        """Encode features [u, 160] without utterance means to ids [u] int64."""
        codes = nearest_centroids(features.astype(np.float32), self.centroids)
        return codes + self.modality.first_id

    def encode_samples(self, samples: np.ndarray) -> np.ndarray:
        """As ``SoundCodec.encode_samples``."""
        units = speech_features(samples).units.astype(np.float32)
        return nearest_centroids(units, self.centroids)

    def decode_codes(self, codes: np.ndarray) -> np.ndarray:
        """Decode to [640 u - 160] samples."""
        return sound_of_log_mel(self.centroids[codes].reshape(-1, MEL_BINS) + self.mean)
