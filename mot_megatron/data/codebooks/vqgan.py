"""Pictures through a pretrained VQGAN, whose table may be replaced by LFQ or FSQ.

Names of weights are those of the taming-transformers package and of Chameleon: ``encoder.*``,
``quant_conv.*``, ``quantize.embedding.weight``, ``post_quant_conv.*`` and ``decoder.*``. With LFQ
or FSQ there is no table, and the two convolutions around it may be absent.

Shapes: n pictures of p x p pixels and g x g codes; d, width of a code's vector.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from mot_megatron.data.codebooks.codec import PictureCodec
from mot_megatron.data.codebooks.convolutional import Decoder, Encoder
from mot_megatron.data.codebooks.image import LARGEST_PIXELS
from mot_megatron.data.codebooks.quantizers import Levels, NearestEntry, Quantizer, Signs
from mot_megatron.data.codebooks.weights import WeightsFile, write_codebook
from mot_megatron.data.corpus import LARGEST_VOCABULARY, Modality
from mot_megatron.errors import DataError

_PIXELS_PER_BATCH = 1 << 20
"""Pixels that pass through a network at a time."""
_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "quantize.")
_TABLE = "quantize.embedding.weight"
_FIRST = "encoder.conv_in.weight"


class PictureSettings(BaseModel):
    """What the weights do not tell."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pixels: int = Field(gt=0, le=LARGEST_PIXELS)
    """Width and height of a picture."""
    quantizer: Literal["table", "lfq", "fsq"] = "table"
    """table: nearest entry of quantize.embedding; lfq: signs; fsq: rounding to ``levels``."""
    levels: tuple[int, ...] = ()
    """With fsq, levels of each component."""


class _Autoencoder(nn.Module):
    """Encoder and decoder with the convolutions next to the quantizer."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()

        def below(part: str) -> dict[str, tuple[int, ...]]:
            return {
                name.removeprefix(part): shape
                for name, shape in shapes.items()
                if name.startswith(part)
            }

        self.encoder = Encoder(below("encoder."))
        self.decoder = Decoder(below("decoder."))
        for name in ("quant_conv", "post_quant_conv"):
            shape = shapes.get(f"{name}.weight")
            module = nn.Identity() if shape is None else nn.Conv2d(shape[1], shape[0], 1)
            self.add_module(name, module)

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """[n, 3, p, p] in -1..1 -> [n, d, g, g]."""
        return self.get_submodule("quant_conv")(self.encoder(pictures))

    def decode(self, vectors: torch.Tensor) -> torch.Tensor:
        """[n, d, g, g] -> [n, 3, p, p], -1..1 and a little beyond."""
        return self.decoder(self.get_submodule("post_quant_conv")(vectors))


class ConvolutionalCodec(PictureCodec):
    """Encodes pictures with the weights of a codebook file, on a GPU if there is one."""

    def __init__(self, modality: Modality, weights: WeightsFile) -> None:
        super().__init__(modality)
        self.weights = weights
        self.settings = weights.settings(PictureSettings)
        self.pixels = self.settings.pixels
        factor = _skeleton(weights).encoder.factor
        if self.pixels % factor:
            raise DataError(
                f"{weights.path}: pixels = {self.pixels}, expected a multiple of {factor}, by which"
                " the encoder reduces a side"
            )
        self.grid = self.pixels // factor

    @classmethod
    def load(cls, path: Path, modality: Modality) -> ConvolutionalCodec:
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
    def device(self) -> torch.device:
        """Where the networks run."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def network(self) -> _Autoencoder:
        """Encoder and decoder with their weights, on ``device``.

        Raises:
            DataError: The file has changed, or a value is not finite.
        """
        network = _skeleton(self.weights)
        tensors = self.weights.read()
        tensors.pop(_TABLE, None)
        network.load_state_dict(tensors, assign=True)
        return network.requires_grad_(False).eval().to(self.device)

    @cached_property
    def quantizer(self) -> Quantizer:
        """As the settings say.

        Raises:
            DataError: The file has changed, or a value is not finite.
        """
        if self.settings.quantizer == "lfq":
            return Signs(_width(self.weights))
        if self.settings.quantizer == "fsq":
            return Levels(self.settings.levels)
        return NearestEntry(self.weights.read(_TABLE)[""].to(self.device))

    @torch.inference_mode()
    def encode_pictures(self, pictures: np.ndarray) -> np.ndarray:
        """As ``PictureCodec.encode_pictures``."""
        codes = []
        for part in torch.from_numpy(pictures).split(self._pictures_at_once):
            values = part.to(self.device).permute(0, 3, 1, 2) / 127.5 - 1
            vectors = self.network.encode(values).permute(0, 2, 3, 1).flatten(0, 2)
            codes.append(self.quantizer.encode(vectors).view(len(part), -1).cpu())
        return torch.cat(codes).numpy()

    @torch.inference_mode()
    def decode_codes(self, codes: np.ndarray) -> np.ndarray:
        """As ``PictureCodec.decode_codes``."""
        pictures = []
        for part in torch.from_numpy(codes).split(self._pictures_at_once):
            vectors = self.quantizer.decode(part.flatten().to(self.device))
            grids = vectors.view(len(part), self.grid, self.grid, -1).permute(0, 3, 1, 2)
            values = ((self.network.decode(grids) + 1) * 127.5).round().clamp(0, 255)
            pictures.append(values.permute(0, 2, 3, 1).to(torch.uint8).cpu())
        return torch.cat(pictures).numpy()

    @property
    def _pictures_at_once(self) -> int:
        return max(1, _PIXELS_PER_BATCH // self.pixels**2)


def import_pictures(weights: WeightsFile, settings: PictureSettings, output: Path) -> int:
    """Write the codebook file of a pretrained autoencoder.

    Weights that are used in training only, such as those of a discriminator, are left out, and so
    is a common prefix of the names such as ``first_stage_model.``.

    Args:
        weights: The pretrained weights.
        settings: What the weights do not tell.
        output: The codebook file.

    Returns:
        Number of codes.

    Raises:
        DataError: A weight is missing or of another shape, or a setting does not fit the weights.
    """
    found = [name for name in weights.shapes if name.endswith(_FIRST)]
    if not found:
        raise DataError(f"{weights.path}: it lacks {_FIRST}; is it a VQGAN?")
    tensors = {
        name: tensor
        for name, tensor in weights.read(found[0].removesuffix(_FIRST)).items()
        if name.startswith(_PARTS) and not (name.startswith("quantize.") and name != _TABLE)
    }
    if settings.quantizer != "table":
        tensors.pop(_TABLE, None)
    write_codebook(output, "vqgan", settings, tensors)
    try:
        written = WeightsFile.open(output)
        codes = _count_codes(written)
        modality = Modality(name="image", first_id=0, size=codes, codec="vqgan", codebook="image")
        codec = ConvolutionalCodec(modality, written)
        blank = np.full((1, codec.pixels, codec.pixels, 3), 255, np.uint8)
        codec.decode_codes(codec.encode_pictures(blank))
    except BaseException:
        output.unlink()
        raise
    return codes


def _skeleton(weights: WeightsFile) -> _Autoencoder:
    """Return the networks without values, checked against the names and shapes of the file."""
    shapes = {name: shape for name, shape in weights.shapes.items() if name != _TABLE}
    try:
        with torch.device("meta"):
            network = _Autoencoder(shapes)
    except KeyError as error:
        raise DataError(f"{weights.path}: it lacks a weight named ...{error.args[0]}") from None
    except (ValueError, RuntimeError, IndexError) as error:
        raise DataError(f"{weights.path}: not the weights of a VQGAN: {error}") from None
    expected = {name: tuple(each.shape) for name, each in network.state_dict().items()}
    for name in sorted(expected.keys() | shapes.keys()):
        if expected.get(name) != shapes.get(name):
            raise DataError(
                f"{weights.path}: {name} has shape {shapes.get(name, 'none')}, expected "
                f"{expected.get(name, 'no such weight')}"
            )
    return network


def _width(weights: WeightsFile) -> int:
    """Return d, the channels that the encoder produces."""
    shape = weights.shapes.get("quant_conv.weight") or weights.shapes["encoder.conv_out.weight"]
    return shape[0]


def _count_codes(weights: WeightsFile) -> int:
    """Return the number of codes, after checking the quantizer against the networks."""
    settings = weights.settings(PictureSettings)
    _skeleton(weights)
    width = _width(weights)
    if settings.quantizer == "table":
        shape = weights.shapes.get(_TABLE, ())
        if len(shape) != 2 or shape[1] != width:
            raise DataError(
                f"{weights.path}: {_TABLE} has shape {shape or 'none'}, expected [codes, {width}]"
            )
        count = shape[0]
    elif settings.quantizer == "lfq":
        count = 2**width
    else:
        count = Levels(settings.levels).num_codes if len(settings.levels) == width else 0
        if count < 1 or min(settings.levels) < 2:
            raise DataError(
                f"{weights.path}: levels = {list(settings.levels)}, expected {width} numbers of at "
                "least 2, one per channel of the encoder's output"
            )
    if count > LARGEST_VOCABULARY:
        raise DataError(f"{weights.path}: {count} codes, expected at most {LARGEST_VOCABULARY}")
    return count
