"""Sound as units of a pretrained speech encoder: HuBERT, wav2vec 2.0 or WavLM.

A unit is the centroid nearest to the output of one of the encoder's layers, as in Lakhotia et al.
(arXiv 2102.01192). Such an encoder has no decoder, so that sound is rebuilt from the mean log-mel
spectrum of each unit: what was said stays, the speaker's voice does not.

The encoder is that of the ``transformers`` package, which is needed to encode only.

Shapes: n samples, u units of 20 ms, d values of a unit, k codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from tqdm import tqdm

from mot_megatron.data.codebooks.codec import SoundCodec
from mot_megatron.data.codebooks.kmeans import nearest_centroids, train_centroids
from mot_megatron.data.codebooks.mel import (
    FRAME_SAMPLES,
    MEL_BINS,
    SAMPLE_RATE,
    log_mel,
    sound_of_log_mel,
)
from mot_megatron.data.codebooks.speech import at_level
from mot_megatron.data.codebooks.weights import WeightsFile, read_json, write_codebook
from mot_megatron.data.corpus import Modality
from mot_megatron.errors import DataError
from mot_megatron.files import read_regular_file

CLASSES = {"hubert": "HubertModel", "wav2vec2": "Wav2Vec2Model", "wavlm": "WavLMModel"}
"""Class in ``transformers`` for each type of encoder."""
_WINDOW_SECONDS = 30
"""Longer sounds are encoded in parts of this length, since attention grows with its square."""
_LEAST_SAMPLES = 1 << 12
"""A shorter last part is joined to the one before."""
_CENTROIDS, _SPECTRA, _MODEL = "centroids", "spectra", "model."


class SoundSettings(BaseModel):
    """What the weights do not tell."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_type: str = Field(pattern="^(hubert|wav2vec2|wavlm)$")
    config: dict[str, Any]
    """The encoder's config.json."""
    layer: int = Field(gt=0)
    """Layer whose output is used, from 1."""
    normalize: bool
    """Whether the encoder expects sound of zero mean and unit variance."""


class SpeechEncoder:
    """An encoder up to one of its layers, on a GPU if there is one."""

    def __init__(self, model: torch.nn.Module, settings: SoundSettings) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.requires_grad_(False).eval().to(self.device)
        self.settings = settings

    @torch.inference_mode()
    def __call__(self, samples: np.ndarray) -> np.ndarray:
        """Return the output of the layer for samples [n] float32 at 16 kHz, [u, d] float32."""
        values = torch.from_numpy(np.ascontiguousarray(samples)).to(self.device)
        if self.settings.normalize:
            values = (values - values.mean()) / (values.var(correction=0) + 1e-7).sqrt()
        window = _WINDOW_SECONDS * SAMPLE_RATE
        ends = [*range(window, len(values) - _LEAST_SAMPLES, window), len(values)]
        parts = [values[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        states = []
        for part in parts:
            output = self.model(part[None], output_hidden_states=True).hidden_states
            states.append(output[self.settings.layer][0])
        return torch.cat(states).float().cpu().numpy()


class HubertCodec(SoundCodec):
    """Encodes with the weights of a codebook file."""

    sample_rate = SAMPLE_RATE

    def __init__(self, modality: Modality, weights: WeightsFile) -> None:
        super().__init__(modality)
        self.weights = weights
        self.settings = weights.settings(SoundSettings)

    @classmethod
    def load(cls, path: Path, modality: Modality) -> HubertCodec:
        """As ``Codec.load``; this reads only the header of the file."""
        weights = WeightsFile.open(path)
        if (found := _count_codes(weights)) != modality.size:
            raise DataError(f"{path}: {found} codes, expected {modality.size}, the modality's size")
        return cls(modality, weights)

    @classmethod
    def count_codes(cls, path: Path) -> int:
        """As ``Codec.count_codes``."""
        return _count_codes(WeightsFile.open(path))

    @cached_property
    def encoder(self) -> SpeechEncoder:
        """The encoder with its weights.

        Raises:
            DataError: The package is missing, the file has changed, or weights do not fit.
        """
        model = _build(self.settings)
        try:
            model.load_state_dict(self.weights.read(_MODEL))
        except RuntimeError as error:
            raise DataError(f"{self.weights.path}: {' '.join(str(error).split())}") from None
        return SpeechEncoder(model, self.settings)

    @cached_property
    def centroids(self) -> np.ndarray:
        """[k, d] float32."""
        return self.weights.read(_CENTROIDS)[""].numpy()

    @cached_property
    def spectra(self) -> np.ndarray:
        """Mean log-mel frames of each unit, [k, frames, 40] float32."""
        return self.weights.read(_SPECTRA)[""].numpy()

    def encode_samples(self, samples: np.ndarray) -> np.ndarray:
        """As ``SoundCodec.encode_samples``."""
        return nearest_centroids(self.encoder(samples), self.centroids)

    def decode_codes(self, codes: np.ndarray) -> np.ndarray:
        """As ``SoundCodec.decode_codes``."""
        return sound_of_log_mel(self.spectra[codes].reshape(-1, MEL_BINS))


def import_sounds(
    folder: Path, layer: int, sounds: Sequence[np.ndarray], codes: int, seed: int, output: Path
) -> None:
    """Write the codebook file of a pretrained encoder, with centroids trained on sounds.

    Args:
        folder: Folder with config.json and model.safetensors as ``transformers`` saves them, and
            perhaps preprocessor_config.json.
        layer: Layer whose output is used, from 1.
        sounds: [n] float32 at 16 kHz each.
        codes: k.
        seed: Seed of the centroids.
        output: The codebook file.

    Raises:
        DataError: The package is missing, the model is of another type, has fewer layers or another
            rate, or the sounds have fewer units than ``codes``.
    """
    settings = _settings_of(folder, layer)
    encoder = SpeechEncoder(_pretrained(folder, settings), settings)
    bar = tqdm(sounds, desc="encoding sounds", unit="sound", ncols=100)
    features = [encoder(samples) for samples in bar]
    vectors = np.concatenate(features)
    order = np.random.default_rng(seed).permutation(len(vectors))
    centroids = train_centroids(vectors[order], codes, seed, "speech codebook")
    spectra = _spectra(sounds, features, centroids, _frames_per_unit(settings))
    tensors = {
        f"{_MODEL}{name}": tensor.cpu() for name, tensor in encoder.model.state_dict().items()
    }
    tensors |= {_CENTROIDS: torch.from_numpy(centroids), _SPECTRA: torch.from_numpy(spectra)}
    write_codebook(output, "hubert_units", settings, tensors)


def _spectra(
    sounds: Sequence[np.ndarray],
    features: Sequence[np.ndarray],
    centroids: np.ndarray,
    frames: int,
) -> np.ndarray:
    """Return the mean log-mel frames of each unit, [k, frames, 40]; of an unused one, the mean."""
    sums = np.zeros((len(centroids), frames, MEL_BINS))
    counts = np.zeros(len(centroids))
    for samples, vectors in zip(sounds, features, strict=True):
        codes = nearest_centroids(vectors, centroids)
        # The window of unit i is centered a little after frame ``frames * i + 1``.
        spectrum = log_mel(at_level(samples))[1:]
        count = min(len(codes), len(spectrum) // frames)
        np.add.at(sums, codes[:count], spectrum[: count * frames].reshape(count, frames, MEL_BINS))
        np.add.at(counts, codes[:count], 1)
    mean = sums.sum(0) / counts.sum()
    used = counts[:, None, None] > 0
    return np.where(used, sums / np.maximum(counts, 1)[:, None, None], mean).astype(np.float32)


def _settings_of(folder: Path, layer: int) -> SoundSettings:
    config = _read_json(folder / "config.json")
    preprocessing: dict[str, Any] = {}
    if (folder / "preprocessor_config.json").is_file():
        preprocessing = _read_json(folder / "preprocessor_config.json")
    if (rate := preprocessing.get("sampling_rate", SAMPLE_RATE)) != SAMPLE_RATE:
        raise DataError(f"{folder}: sampling_rate = {rate}, expected {SAMPLE_RATE}")
    kind = config.get("model_type")
    if kind not in CLASSES:
        raise DataError(
            f"{folder / 'config.json'}: model_type = {kind!r}, expected one of {', '.join(CLASSES)}"
        )
    layers = config.get("num_hidden_layers", 12)
    if not 0 < layer <= layers:
        raise DataError(f"layer = {layer}, expected 1..{layers}, the layers of {folder}")
    if not config.get("do_stable_layer_norm", False):
        # Later layers are not used. Models with a last norm apply it after the last layer alone.
        config = config | {"num_hidden_layers": layer}
    return SoundSettings(
        model_type=kind,
        config=config,
        layer=layer,
        normalize=bool(preprocessing.get("do_normalize", True)),
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = read_json(read_regular_file(path).decode(), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None
    if not isinstance(values, dict):
        raise DataError(f"{path}: expected an object")
    return values


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise DataError(
            "codec 'hubert_units': encoding needs the transformers package; install it with "
            "pip install 'transformers>=5'"
        ) from None
    return transformers


def _build(settings: SoundSettings) -> torch.nn.Module:
    kind = getattr(_transformers(), CLASSES[settings.model_type])
    try:
        return kind(kind.config_class.from_dict(settings.config))
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"config.json of the encoder: {' '.join(str(error).split())}") from None


def _pretrained(folder: Path, settings: SoundSettings) -> torch.nn.Module:
    kind = getattr(_transformers(), CLASSES[settings.model_type])
    try:
        # Older files name the weights of the positional convolution otherwise; this knows both.
        model, report = kind.from_pretrained(
            folder,
            config=kind.config_class.from_dict(settings.config),
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{folder}: {' '.join(str(error).split())}") from None
    if missing := sorted(report["missing_keys"]):
        raise DataError(f"{folder}: it lacks {missing[0]}")
    return model


def _frames_per_unit(settings: SoundSettings) -> int:
    hop = prod(settings.config.get("conv_stride", (5, 2, 2, 2, 2, 2, 2)))
    if hop % FRAME_SAMPLES:
        raise DataError(
            f"conv_stride of the encoder: {hop} samples per unit, expected a multiple of "
            f"{FRAME_SAMPLES}"
        )
    return hop // FRAME_SAMPLES


def _count_codes(weights: WeightsFile) -> int:
    settings = weights.settings(SoundSettings)
    centroids, spectra = (weights.shapes.get(name, ()) for name in (_CENTROIDS, _SPECTRA))
    expected = (centroids[0] if centroids else 0, _frames_per_unit(settings), MEL_BINS)
    width = settings.config.get("hidden_size", 768)
    if len(centroids) != 2 or centroids[1] != width or spectra != expected:
        raise DataError(
            f"{weights.path}: centroids {centroids or 'none'} and spectra {spectra or 'none'}, "
            f"expected [codes, {width}] and [codes, {expected[1]}, {MEL_BINS}]"
        )
    return centroids[0]
