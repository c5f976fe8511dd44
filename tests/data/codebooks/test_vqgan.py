"""Pretrained picture codecs: equal to other implementations, whole round trips, bad files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig
from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE
from transformers.models.janus.configuration_janus import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAE

from mot_megatron.data.codebooks.quantizers import Levels, Quantizer, Signs
from mot_megatron.data.codebooks.vqgan import (
    ConvolutionalCodec,
    PictureSettings,
    import_pictures,
)
from mot_megatron.data.codebooks.weights import WeightsFile
from mot_megatron.data.corpus import Modality
from mot_megatron.errors import DataError

CODES, WIDTH, LEVELS = 50, 6, 3
PIXELS = 24


def janus() -> JanusVQVAE:
    torch.manual_seed(1)
    config = JanusVQVAEConfig(
        embed_dim=WIDTH, num_embeddings=CODES, latent_channels=8, base_channels=32,
        channel_multiplier=[1, 1, 2], num_res_blocks=1, double_latent=False,
    )  # fmt: skip
    model = JanusVQVAE(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():  # vectors around zero, and entries near them, so that many are used
        vectors = encoded(model, pictures(9, seed=1))
        deviation, bias = vectors.std(0), model.quant_conv.bias
        assert bias is not None
        model.quant_conv.weight /= deviation[:, None, None, None]
        bias.copy_((bias - vectors.mean(0)) / deviation)
        vectors = encoded(model, pictures(9, seed=1))
        model.quantize.embedding.weight.copy_(vectors[:: len(vectors) // CODES][:CODES])
    return model


def encoded(model: JanusVQVAE, given: np.ndarray) -> torch.Tensor:
    """Return the vectors before quantization, [n * g * g, d]."""
    return model.quant_conv(model.encoder(as_input(given))).permute(0, 2, 3, 1).flatten(0, 2)


def taming_names(model: JanusVQVAE) -> dict[str, torch.Tensor]:
    """Return the weights with the levels of the decoder in the order of taming-transformers."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        if parts[:2] == ["decoder", "up"]:
            parts[2] = str(LEVELS - 1 - int(parts[2]))
        tensors[".".join(parts)] = tensor.clone()
    return tensors


def imported(folder: Path, tensors: dict[str, torch.Tensor], **settings: object) -> Path:
    save_file(tensors, folder / "given.safetensors")
    chosen = PictureSettings.model_validate({"pixels": PIXELS} | settings)
    import_pictures(WeightsFile.open(folder / "given.safetensors"), chosen, folder / "image.st")
    return folder / "image.st"


def load(path: Path, first_id: int = 7) -> ConvolutionalCodec:
    size = ConvolutionalCodec.count_codes(path)
    modality = Modality(
        name="image", first_id=first_id, size=size, codec="vqgan", codebook=path.name
    )
    return ConvolutionalCodec.load(path, modality)


def pictures(count: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (count, PIXELS, PIXELS, 3), dtype=np.uint8)


def as_input(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values).permute(0, 3, 1, 2).float() / 255 * 2 - 1


@torch.no_grad()
def test_equal_to_another_implementation(tmp_path: Path) -> None:
    model = janus()
    training_only = {"loss.discriminator.weight": torch.ones(3), "quantize.usage": torch.ones(2)}
    tensors = {f"first_stage_model.{k}": v for k, v in taming_names(model).items()}
    tensors |= {f"first_stage_model.{k}": v for k, v in training_only.items()}
    path = imported(tmp_path, tensors)
    codec = load(path)
    assert not [name for name in codec.weights.shapes if "loss" in name or "usage" in name]
    assert (codec.tokens_per_item, codec.row_length, codec.modality.size) == (36, 6, CODES)
    given = pictures(5)
    ids = codec.encode(given)

    distances = torch.cdist(
        encoded(model, given).double(), model.quantize.embedding.weight.double()
    )
    expected = distances.argmin(1).view(5, 36)
    assert np.array_equal(ids, expected.numpy() + 7)
    assert len(np.unique(ids)) > 5

    entries = model.quantize.embedding.weight[expected].view(5, 6, 6, WIDTH).permute(0, 3, 1, 2)
    decoded = model.decoder(model.post_quant_conv(entries))
    levels = ((decoded.clamp(-1, 1) + 1) / 2 * 255).permute(0, 2, 3, 1)
    for row, picture in zip(ids, levels, strict=True):
        assert np.abs(codec.decode(row) - picture.numpy()).max() < 0.51


@torch.no_grad()
def test_equal_to_chameleon(tmp_path: Path) -> None:
    """Its encoder has another number of blocks, and attention at a level of choice."""
    torch.manual_seed(2)
    config = ChameleonVQVAEConfig(
        embed_dim=WIDTH, num_embeddings=CODES, double_latent=False, latent_channels=WIDTH,
        resolution=PIXELS, base_channels=32, channel_multiplier=[1, 2], num_res_blocks=2,
        attn_resolutions=[PIXELS], attn_type="vanilla",
    )  # fmt: skip
    model = ChameleonVQVAE(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    tensors = {name: each.clone() for name, each in model.state_dict().items()}
    with pytest.raises(DataError, match=r"it lacks a weight named \.\.\.conv_in\.weight"):
        imported(tmp_path, tensors)
    assert not (tmp_path / "image.st").exists()
    decoder = {
        name: each for name, each in taming_names(janus()).items() if name.startswith("decoder.")
    }
    width = decoder["decoder.conv_in.weight"].shape[1]
    tensors["post_quant_conv.weight"] = torch.zeros(width, WIDTH, 1, 1)
    tensors["post_quant_conv.bias"] = torch.zeros(width)
    path = imported(tmp_path, tensors | decoder)
    given = pictures(3)
    codec = load(path)
    found = codec.network.encode(as_input(given))
    expected = model.quant_conv(model.encoder(as_input(given)))
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("quantizer", [Signs(5), Levels([8, 5, 3]), Levels([2]), Signs(1)])
def test_every_code_has_its_vector(quantizer: Quantizer) -> None:
    codes = torch.arange(quantizer.num_codes)
    vectors = quantizer.decode(codes)
    assert vectors.shape == (quantizer.num_codes, quantizer.width)
    assert len(vectors.unique(dim=0)) == quantizer.num_codes
    assert vectors.abs().max() <= 1
    # Far enough from zero, tanh leaves the rounding as it is.
    assert torch.equal(
        quantizer.encode(
            vectors * 0.999 if isinstance(quantizer, Signs) else inverse_bound(vectors, quantizer)
        ),
        codes,
    )


def inverse_bound(vectors: torch.Tensor, quantizer: Quantizer) -> torch.Tensor:
    """Return vectors whose bounded values, scaled as the paper says, are ``vectors``."""
    assert isinstance(quantizer, Levels)
    levels = quantizer.levels
    half = (levels - 1) * (1 + 1e-3) / 2
    offset = torch.where(levels % 2 == 0, 0.5, 0.0)
    wanted = ((vectors * (levels // 2)) + offset) / half
    return wanted.clamp(-0.9999, 0.9999).atanh() - (offset / half).atanh()


def test_first_component_of_signs_is_most_significant() -> None:
    assert Signs(3).decode(torch.tensor([4])).tolist() == [[1, -1, -1]]


def test_first_component_of_levels_is_least_significant() -> None:
    assert Levels([3, 5]).decode(torch.tensor([2])).tolist() == [[1, -1]]


@pytest.mark.parametrize(
    ("settings", "codes"),
    [({"quantizer": "lfq"}, 2**WIDTH), ({"quantizer": "fsq", "levels": [3, 4, 3, 3, 3, 3]}, 972)],
)
def test_without_a_table(tmp_path: Path, settings: dict[str, object], codes: int) -> None:
    tensors = taming_names(janus())
    del tensors["quantize.embedding.weight"]
    codec = load(imported(tmp_path, tensors, **settings))
    assert codec.modality.size == codes
    ids = codec.encode(pictures(2))
    assert len(np.unique(ids)) > 5
    assert codec.decode(ids[0]).shape == (PIXELS, PIXELS, 3)
    assert codec.encode(pictures(0)).shape == (0, 36)


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({"encoder.conv_in.weight": None}, {}, "it lacks encoder.conv_in.weight; is it a VQGAN"),
        ({"decoder.mid.block_1.conv1.bias": None}, {}, r"block_1\.conv1\.bias has shape none"),
        ({"decoder.conv_in.bias": torch.ones(3)}, {}, r"decoder\.conv_in\.bias has shape \(3,\)"),
        ({"decoder.other.bias": torch.ones(3)}, {}, r"decoder\.other\.bias .* no such weight"),
        ({"quantize.embedding.weight": None}, {}, r"embedding\.weight has shape none"),
        ({"quantize.embedding.weight": torch.ones(9, 5)}, {}, r"expected \[codes, 6\]"),
        ({"decoder.conv_in.bias": torch.full((64,), torch.nan)}, {}, "not finite"),
        ({}, {"pixels": 26}, "pixels = 26, expected a multiple of 4"),
        ({}, {"quantizer": "fsq", "levels": [3, 3]}, r"levels = \[3, 3\], expected 6 numbers"),
        ({}, {"quantizer": "fsq", "levels": [3, 3, 1, 3, 3, 3]}, "of at least 2"),
        ({}, {"quantizer": "fsq", "levels": [99] * 6}, r"codes, expected at most 16777216"),
    ],
)  # fmt: skip
def test_bad_weights_are_refused(
    tmp_path: Path,
    change: dict[str, torch.Tensor | None],
    settings: dict[str, object],
    message: str,
) -> None:
    tensors = {k: v for k, v in (taming_names(janus()) | change).items() if v is not None}
    with pytest.raises(DataError, match=message):
        imported(tmp_path, tensors, **settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["given.safetensors"]


def test_bad_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        WeightsFile.open(tmp_path / "absent.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(DataError, match="not a safetensors file"):
        WeightsFile.open(tmp_path / "damaged.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(DataError, match="names no codec; mot prepare codec makes"):
        load(tmp_path / "plain.safetensors")
