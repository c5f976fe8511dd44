"""Speech as 25 codes a second: four 10 ms log-mel frames side by side, each its nearest centroid.

The mean of every utterance is removed first, so that codes say what is spoken rather than by whom
and how loud; decoding adds the mean of all training utterances instead.

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
"""Root mean square that every utterance is brought to."""
_TRAINING_UNITS = 120_000
_SHORTEST_UNITS = 5


class SpeechFeatures(NamedTuple):
    """An utterance ready to be coded."""

    units: np.ndarray
    """[u, 160], one vector per 40 ms, the utterance's mean removed."""
    mean: np.ndarray
    """[40], the mean that was removed."""


def speech_features(samples: np.ndarray) -> SpeechFeatures:
    """Vectors to be coded of ``samples`` [n] float32 at 16 kHz; none for less than 0.2 s."""
    units = len(samples) * UNITS_PER_SECOND // SAMPLE_RATE
    if units < _SHORTEST_UNITS:
        return SpeechFeatures(np.zeros((0, _WIDTH), np.float16), np.zeros(MEL_BINS, np.float32))
    level = np.sqrt((samples**2).mean())
    spectrum = log_mel((samples * (_LEVEL / (level + 1e-6))).astype(np.float32))
    frames = spectrum[: units * FRAMES_PER_UNIT]
    mean = frames.mean(axis=0)
    return SpeechFeatures((frames - mean).reshape(units, _WIDTH).astype(np.float16), mean)


def train_speech_codebook(features: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Centroids for ``UnitCodec``.

    Args:
        features: [u, 160], utterance means removed, of the training split only.
        count: How many codes.
        seed: Chooses the units trained on and their order.

    Returns:
        [count, 160] float32.

    Raises:
        DataError: Too few units for that many codes.
    """
    random = np.random.default_rng(seed)
    chosen = random.permutation(len(features))[:_TRAINING_UNITS]
    return train_centroids(features[chosen].astype(np.float32), count, seed, "speech codebook")


class UnitCodec(Codec):
    """ids -> float32 sound at 16 kHz, and vectors of ``speech_features`` -> ids."""

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
        """The codebook file's content."""
        return pack_arrays(centroids=self.centroids, mean=self.mean)

    def encode(self, features: np.ndarray) -> np.ndarray:
        """[u, 160], utterance means removed -> ids [u] int64."""
        codes = nearest_centroids(features.astype(np.float32), self.centroids)
        return codes + self.modality.first_id

    def encode_sound(self, samples: np.ndarray) -> np.ndarray:
        """[n] float32 at 16 kHz -> ids [u] int64."""
        return self.encode(speech_features(samples).units)

    def decode(self, token_ids: TokenIds) -> np.ndarray:
        """The sound of at least one id, float32 [640 u - 160] at 16 kHz."""
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
