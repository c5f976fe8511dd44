"""Units of pretrained speech encoders: equal to transformers, whole round trips, bad files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mot_megatron.data.codebooks import hubert
from mot_megatron.data.codebooks.hubert import CLASSES, HubertCodec, import_sounds
from mot_megatron.data.codebooks.mel import log_mel
from mot_megatron.data.corpus import Modality
from mot_megatron.errors import DataError

CODES, LAYER = 12, 2
SHAPE = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24,
    "conv_dim": (8, 8, 8, 8, 8, 8, 8), "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}  # fmt: skip


def save_model(folder: Path, kind: str = "hubert", **changes: object) -> torch.nn.Module:
    torch.manual_seed(3)
    model_class = getattr(transformers, CLASSES[kind])
    model = model_class(model_class.config_class(**(SHAPE | changes))).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.4)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"sampling_rate": 16_000, "do_normalize": kind != "hubert"})
    )
    return model


def voices(count: int, seconds: float = 0.8) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    time = np.arange(int(seconds * 16_000)) / 16_000
    return [
        (np.sin(2 * np.pi * random.uniform(100, 900) * time) * 0.3
         + random.normal(0, 0.05, len(time))).astype(np.float32)
        for _ in range(count)
    ]  # fmt: skip


def load(path: Path) -> HubertCodec:
    modality = Modality(
        name="speech", first_id=100, size=CODES, codec="hubert_units", codebook=path.name
    )
    return HubertCodec.load(path, modality)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("hubert", {}), ("wav2vec2", {"do_stable_layer_norm": True}), ("wavlm", {})],
)
def test_units_are_nearest_to_the_layer(
    tmp_path: Path, kind: str, changes: dict[str, object]
) -> None:
    model = save_model(tmp_path / "model", kind, **changes)
    path = tmp_path / "speech.safetensors"
    import_sounds(tmp_path / "model", LAYER, voices(6), CODES, 0, path)
    codec = load(path)
    samples = voices(7)[-1]
    values = torch.from_numpy(samples)
    if kind != "hubert":
        values = (values - values.mean()) / torch.sqrt(values.var(correction=0) + 1e-7)
    with torch.no_grad():
        states = model(values[None], output_hidden_states=True).hidden_states[LAYER][0]
    distances = torch.cdist(states, torch.from_numpy(codec.centroids))
    ids = codec.encode(samples)
    assert np.array_equal(ids - 100, distances.argmin(1).numpy())
    assert len(ids) == (len(samples) - 400) // 320 + 1
    assert len(np.unique(ids)) > 2
    # One layer fewer is kept, unless a last norm would be applied to it.
    kept = {name.split(".")[3] for name in codec.weights.shapes if "encoder.layers" in name}
    assert kept == ({"0", "1", "2"} if changes else {"0", "1"})
    sound = codec.decode(ids)
    assert len(sound) == (2 * len(ids) - 1) * 160
    assert np.abs(sound).max() == pytest.approx(0.8)


def test_spectra_are_means_of_their_units() -> None:
    """Two sounds, each with a unit of its own: the spectra are theirs."""
    low, high = (np.sin(2 * np.pi * hertz * np.arange(8000) / 16_000) for hertz in (300, 3000))
    sounds = [low.astype(np.float32), high.astype(np.float32)]
    features = [np.full((24, 1), value, np.float32) for value in (-1, 1)]
    centroids = np.array([[-1], [1], [9]], np.float32)
    spectra = hubert._spectra(sounds, features, centroids, 2)
    for samples, found in zip(sounds, spectra, strict=False):
        expected = log_mel((0.05 / np.sqrt((samples**2).mean()) * samples).astype(np.float32))
        assert np.abs(found - expected[10:12]).max() < 1
        assert np.argmax(found[0]) == np.argmax(expected[10])
    assert np.allclose(spectra[2], spectra[:2].mean(0), atol=1e-5)


def test_long_sounds_are_encoded_in_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path / "model")
    import_sounds(tmp_path / "model", LAYER, voices(6), CODES, 0, tmp_path / "speech.safetensors")
    codec = load(tmp_path / "speech.safetensors")
    monkeypatch.setattr(hubert, "_WINDOW_SECONDS", 1)
    samples = voices(1, seconds=2.5)[0]
    whole = codec.encode(samples)
    parts = [codec.encode(part) for part in np.split(samples, [16_000, 32_000])]
    assert np.array_equal(whole, np.concatenate(parts))
    # A last part that is too short for the encoder is joined to the one before.
    ends = codec.encode(samples[:16_100])
    monkeypatch.undo()
    assert np.array_equal(ends, codec.encode(samples[:16_100]))


def test_bad_models_are_refused(tmp_path: Path) -> None:
    model, path = tmp_path / "model", tmp_path / "speech.safetensors"

    def refused(message: str, layer: int = LAYER, codes: int = CODES) -> None:
        with pytest.raises(DataError, match=message):
            import_sounds(model, layer, voices(2), codes, 0, path)
        assert not path.exists()

    refused(r"config\.json: No such file")
    save_model(model)
    refused(r"layer = 4, expected 1\.\.3", layer=4)
    refused("speech codebook: 78 vectors .* at least 100", codes=100)
    config = (model / "config.json").read_text()
    (model / "config.json").write_text(config.replace('"hubert"', '"bert"'))
    refused("model_type = 'bert', expected one of hubert, wav2vec2, wavlm")
    (model / "config.json").write_text("{")
    refused("not JSON")
    (model / "config.json").write_text(config.replace('"hidden_size": 16', '"hidden_size": 15'))
    refused("model")
    (model / "config.json").write_text(config)
    (model / "preprocessor_config.json").write_text('{"sampling_rate": 8000}')
    refused("sampling_rate = 8000, expected 16000")
    (model / "preprocessor_config.json").unlink()
    tensors = load_file(model / "model.safetensors")
    del tensors["encoder.layers.0.attention.k_proj.weight"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    refused("it lacks encoder.layers.0.attention.k_proj.weight")
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    refused("no file named model.safetensors")


def test_bad_codebooks_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    path = tmp_path / "speech.safetensors"
    import_sounds(tmp_path / "model", LAYER, voices(6), CODES, 0, path)
    tensors, metadata = load_file(path), dict(load(path).weights.metadata)

    def refused(message: str, **changes: torch.Tensor) -> None:
        save_file(tensors | changes, path, metadata)
        with pytest.raises(DataError, match=message):
            load(path).encode(voices(1)[0])

    refused(r"\(12, 15\) and spectra", centroids=torch.ones(12, 15))
    refused("11 codes, expected 12", centroids=torch.ones(11, 16), spectra=torch.ones(11, 2, 40))
    refused("not finite", centroids=torch.full((12, 16), torch.inf))
    metadata["mot_settings"] = "{}"
    refused("settings of hubert_units: ")
