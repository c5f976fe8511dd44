"""Speech as 25 codes per second: four 10 ms log-mel frames become their nearest centroid.

The mean of each utterance is removed first, so that codes depend on what is said, not on the
speaker and loudness. Decoding adds the mean of all training utterances instead.

Shapes: n samples, u units, d = 160 values of a unit.
"""

from __future__ import annotations

import wave
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mot_megatron.data.codebooks.codec import Codec, TokenIds, pack_arrays, read_arrays
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
    level = np.sqrt((samples**2).mean())
    spectrum = log_mel((samples * (_LEVEL / (level + 1e-6))).astype(np.float32))
    frames = spectrum[: units * FRAMES_PER_UNIT]
    mean = frames.mean(axis=0)
    return SpeechFeatures((frames - mean).reshape(units, _WIDTH).astype(np.float16), mean)


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


class UnitCodec(Codec):
    """Decodes ids to sound, float32 at 16 kHz, and encodes vectors of ``speech_features``."""

    suffix = ".wav"
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

    def save(self) -> bytes:
        """Return the content of the codebook file."""
        return pack_arrays(centroids=self.centroids, mean=self.mean)

    def encode(self, features: np.ndarray) -> np.ndarray:
        """Encode features [u, 160] without utterance means to ids [u] int64."""
        codes = nearest_centroids(features.astype(np.float32), self.centroids)
        return codes + self.modality.first_id

    def encode_sound(self, samples: np.ndarray) -> np.ndarray:
        """Encode samples [n] float32 at 16 kHz to ids [u] int64."""
        return self.encode(speech_features(samples).units)

    def decode(self, token_ids: TokenIds) -> np.ndarray:
        """Decode at least one id to sound, float32 [640 u - 160] at 16 kHz."""
        codes = self.codes(token_ids)
        if not len(codes):
            raise DataError("speech of 0 tokens, expected at least 1")
        return sound_of_log_mel(self.centroids[codes].reshape(-1, MEL_BINS) + self.mean)

    def write(self, token_ids: TokenIds, path: Path) -> None:
        """Write the sound as a .wav."""
        write_sound(self.decode(token_ids), path)


def write_sound(samples: np.ndarray, path: Path) -> None:
    """Write [n] samples in -1..1 at 16 kHz as a 16-bit mono .wav."""
    with wave.open(str(path), "wb") as stream:
        stream.setnchannels(1)
        stream.setsampwidth(2)
        stream.setframerate(SAMPLE_RATE)
        stream.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
