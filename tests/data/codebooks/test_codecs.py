"""Codecs: round trips, minimum fidelity, files, and errors for bad ids and bad files."""

import io
import wave
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mot_megatron.data.codebooks import codec_class, load_codec
from mot_megatron.data.codebooks.arrays import pack_arrays
from mot_megatron.data.codebooks.image import (
    PatchCodec,
    join_patches,
    peak_signal_to_noise,
    split_patches,
    train_image_codebook,
)
from mot_megatron.data.codebooks.kmeans import nearest_centroids, train_centroids
from mot_megatron.data.codebooks.mel import (
    SAMPLE_RATE,
    log_mel,
    resample,
    sound_of_log_mel,
    trim_silence,
)
from mot_megatron.data.codebooks.speech import UnitCodec, speech_features, train_speech_codebook
from mot_megatron.data.codebooks.text import TextCodec, train_text_codebook
from mot_megatron.data.corpus import Modality
from mot_megatron.errors import DataError

TEXTS = ["red heart", "coeur rouge", "rotes Herz", "красное сердце", "a heart on fire", "🙂"] * 4
SPECIAL = ["<pad>", "<bos>", "<eos>", "<boi>", "<en>"]
TEXT = Modality(name="words", first_id=0, size=400, codec="bpe", codebook="tokenizer.json")
IMAGE = Modality(name="drawing", first_id=400, size=64, codec="image_patches", codebook="i.npz")
SPEECH = Modality(name="voice", first_id=464, size=48, codec="speech_units", codebook="s.npz")


def discs(count: int, seed: int) -> np.ndarray:
    """Return pictures [count, 32, 32, 3] of colored discs on white."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[:32, :32]
    pictures = np.full((count, 32, 32, 3), 255, np.uint8)
    for picture in pictures:
        (y, x), radius = random.integers(12, 20, 2), random.integers(6, 12)
        inside = (rows - y) ** 2 + (columns - x) ** 2 < radius**2
        picture[inside] = ((200, 30, 30), (30, 30, 200))[int(random.integers(2))]
    return pictures


def vowels(count: int, seed: int) -> np.ndarray:
    """Return about ``count`` * 0.3 s of harmonic tones of varying pitch, float32 at 16 kHz."""
    random = np.random.default_rng(seed)
    time = np.arange(int(0.3 * SAMPLE_RATE)) / SAMPLE_RATE
    parts = []
    for _ in range(count):
        pitch, center = random.uniform(100, 200), random.uniform(400, 2500)
        harmonics = np.arange(1, 25)[:, None] * pitch
        weights = np.exp(-(((harmonics - center) / 300) ** 2))
        parts.append((weights * np.sin(2 * np.pi * harmonics * time)).sum(axis=0))
    return np.concatenate(parts).astype(np.float32) / 25


@pytest.fixture(scope="module")
def text_codec() -> TextCodec:
    return TextCodec.parse(train_text_codebook(TEXTS, TEXT.size, SPECIAL), TEXT, "test")


@pytest.fixture(scope="module")
def image_codec() -> PatchCodec:
    return PatchCodec(IMAGE, train_image_codebook(discs(300, 1), IMAGE.size, seed=0))


@pytest.fixture(scope="module")
def speech_codec() -> UnitCodec:
    features = speech_features(vowels(60, 1))
    centroids = train_speech_codebook(features.units, SPEECH.size, seed=0)
    return UnitCodec(SPEECH, centroids, features.mean)


@pytest.mark.parametrize("text", ["red heart", "сердце", "日本語 \n\t", "never seen ☃", ""])
def test_any_text_round_trips(text_codec: TextCodec, text: str) -> None:
    assert text_codec.decode(text_codec.encode(text)) == text


def test_special_tokens_in_prompts(text_codec: TextCodec) -> None:
    heart = text_codec.encode("red heart")
    assert text_codec.encode("<bos><en>red heart<boi>") == [1, 4, *heart, 3]
    assert text_codec.encode("<bos> <en> red heart <boi>") == [1, 4, *heart, 3]
    assert text_codec.decode([1, 4, *heart, 3]) == "red heart"
    assert text_codec.decode([1, 4, *heart, 3], keep_special=True) == "<bos><en>red heart<boi>"
    assert text_codec.encode_many(["red heart", ""]) == [heart, []]


def test_text_codebook_is_deterministic() -> None:
    assert train_text_codebook(TEXTS, 400, SPECIAL) == train_text_codebook(TEXTS, 400, SPECIAL)


def test_text_ids_are_offset_by_the_modality_range() -> None:
    later = TEXT.model_copy(update={"first_id": 1000})
    codec = TextCodec.parse(train_text_codebook(TEXTS, TEXT.size, SPECIAL), later, "test")
    assert min(codec.encode("red heart")) >= 1000
    assert codec.decode(codec.encode("red heart")) == "red heart"


def test_patches_round_trip() -> None:
    pictures = discs(3, 0)
    assert np.array_equal(join_patches(split_patches(pictures)), pictures)
    # reading order: patch 1 is to the right of patch 0
    assert np.array_equal(split_patches(pictures)[1].reshape(4, 4, 3), pictures[0, :4, 4:8])


def test_pictures_are_reconstructed_well(image_codec: PatchCodec) -> None:
    pictures = discs(20, 2)
    ids = image_codec.encode(pictures)
    assert ids.shape == (20, 64)
    assert ids.min() >= IMAGE.first_id
    assert ids.max() < IMAGE.end_id
    decoded = np.stack([image_codec.decode(row) for row in ids])
    assert decoded.dtype == np.uint8
    ratio = peak_signal_to_noise(pictures, decoded).mean()
    assert ratio > 20.0
    # a single-color picture, the best that one code can give, scores far lower
    flat = np.broadcast_to(pictures.mean(axis=(1, 2), keepdims=True), pictures.shape)
    assert peak_signal_to_noise(pictures, flat).mean() < ratio - 5


def test_peak_signal_to_noise() -> None:
    black = np.zeros((1, 32, 32, 3), np.uint8)
    # every value off by 1: 10 log10(255^2 / 1) = 48.13 dB
    assert peak_signal_to_noise(black, black + 1) == pytest.approx(48.13, abs=0.01)


def test_speech_is_reconstructed_well(speech_codec: UnitCodec) -> None:
    samples = vowels(6, 5)
    ids = speech_codec.encode(samples)
    assert len(ids) == 45  # 6 * 0.3 s * 25 Hz
    decoded = speech_codec.decode(ids)
    assert decoded.dtype == np.float32
    assert len(decoded) == 45 * 640 - 160
    assert np.abs(decoded).max() == pytest.approx(0.8)
    original, back = speech_features(samples), speech_features(decoded)
    units = min(len(original.units), len(back.units))
    pair = original.units[:units].ravel(), back.units[:units].ravel()
    assert np.corrcoef(*pair)[0, 1] > 0.7


def test_griffin_lim_approaches_the_spectrum() -> None:
    samples = vowels(3, 7)
    spectrum = log_mel(samples)
    assert spectrum.shape == (len(samples) // 160 + 1, 40)
    back = sound_of_log_mel(spectrum)
    loudness = np.sqrt((samples**2).mean() / (back**2).mean())
    again = log_mel((back * loudness).astype(np.float32))
    length = min(len(spectrum), len(again))
    assert np.corrcoef(spectrum[:length].ravel(), again[:length].ravel())[0, 1] > 0.9


def test_speech_codes_ignore_loudness() -> None:
    samples = vowels(3, 7)
    loud, quiet = speech_features(samples), speech_features(samples * 0.2)
    assert np.allclose(loud.units, quiet.units, atol=0.02)


def test_short_sound_has_no_units() -> None:
    assert speech_features(np.ones(3000, np.float32)).units.shape == (0, 160)


def test_resampling_keeps_a_tone() -> None:
    time = np.arange(22050) / 22050
    tone = np.sin(2 * np.pi * 440 * time).astype(np.float32)
    expected = np.sin(2 * np.pi * 440 * np.arange(SAMPLE_RATE) / SAMPLE_RATE)
    found = resample(tone, 22050)
    assert len(found) == SAMPLE_RATE
    assert np.abs(found - expected)[500:-500].max() < 0.01
    assert resample(tone, SAMPLE_RATE) is tone


def test_silence_is_trimmed() -> None:
    silence, tone = np.zeros(16000, np.float32), vowels(1, 0)
    trimmed = trim_silence(np.concatenate([silence, tone, silence]))
    assert len(tone) <= len(trimmed) <= len(tone) + 2 * 6 * 160
    assert len(trim_silence(silence)) == 0


def test_centroids_are_deterministic_and_nearest() -> None:
    vectors = np.random.default_rng(0).normal(size=(500, 6)).astype(np.float32)
    first, second = (train_centroids(vectors, 20, 3, "test") for _ in range(2))
    assert np.array_equal(first, second)
    distances = ((vectors[:, None] - first) ** 2).sum(axis=2)
    assert np.array_equal(nearest_centroids(vectors, first), distances.argmin(axis=1))


def test_too_little_training_data_is_rejected() -> None:
    with pytest.raises(DataError, match=r"image codebook: 64 vectors .* at least 512"):
        train_image_codebook(discs(1, 0), 512, seed=0)


def test_files_round_trip(
    tmp_path: Path, text_codec: TextCodec, image_codec: PatchCodec, speech_codec: UnitCodec
) -> None:
    assert image_codec.save() == image_codec.save()
    (tmp_path / "i.npz").write_bytes(image_codec.save())
    (tmp_path / "s.npz").write_bytes(speech_codec.save())
    (tmp_path / "tokenizer.json").write_text(text_codec.tokenizer.to_str())
    cases = [(text_codec, text_codec.encode("red heart"))]
    cases += [(image_codec, image_codec.encode(discs(1, 3))[0])]
    cases += [(speech_codec, speech_codec.encode(vowels(2, 3)))]
    for codec, ids in cases:
        loaded = load_codec(tmp_path, codec.modality)
        assert type(loaded) is codec_class(codec.modality.codec)
        assert np.array_equal(loaded.decode(ids), codec.decode(ids))
        loaded.write(ids, tmp_path / f"out{codec.suffix}")
    assert (tmp_path / "out.txt").read_text() == "red heart\n"
    assert Image.open(tmp_path / "out.png").size == (32, 32)
    with wave.open(str(tmp_path / "out.wav")) as sound:
        assert sound.getparams()[:3] == (1, 2, 16000)


def test_error_names_a_bad_id(image_codec: PatchCodec, speech_codec: UnitCodec) -> None:
    with pytest.raises(DataError, match=r"token id 7 at position 1 .* drawing, expected 400..463"):
        image_codec.decode([400, 7])
    with pytest.raises(DataError, match="63 tokens, expected exactly 64"):
        image_codec.decode([400] * 63)
    with pytest.raises(DataError, match="speech of 0 tokens"):
        speech_codec.decode([])


def test_error_names_a_bad_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"i\.npz: No such file"):
        load_codec(tmp_path, IMAGE)
    (tmp_path / "i.npz").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(DataError, match=r"i\.npz: not an .npz file"):
        load_codec(tmp_path, IMAGE)
    (tmp_path / "i.npz").write_bytes(pack_arrays(centroids=np.zeros((3, 48), np.float32)))
    with pytest.raises(DataError, match=r"\(3, 48\).* expected .*\(64, 48\)"):
        load_codec(tmp_path, IMAGE)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json: not a tokenizer"):
        load_codec(tmp_path, TEXT)
    (tmp_path / "tokenizer.json").write_bytes(train_text_codebook(TEXTS, 400, SPECIAL))
    with pytest.raises(DataError, match="expected at most 100"):
        load_codec(tmp_path, TEXT.model_copy(update={"size": 100}))
    with pytest.raises(DataError, match="modality plain has codec = 'none'"):
        load_codec(tmp_path, Modality(name="plain", first_id=0, size=3))


def zip_bomb() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("centroids.npy", bytes(1 << 26))
    return stream.getvalue()


def claim_of_terabytes() -> bytes:
    header = io.BytesIO()
    description = {"descr": "<f4", "fortran_order": False, "shape": (2**38, 48)}
    np.lib.format.write_array_header_1_0(header, description)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("centroids.npy", header.getvalue())
    return stream.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        zip_bomb(),
        claim_of_terabytes(),
        pack_arrays(centroids=np.full((64, 48), np.nan, np.float32)),
        pack_arrays(centroids=np.full((64, 48), "text")),
    ],
    ids=["bomb", "terabytes", "nan", "text"],
)
def test_oversized_or_invalid_codebooks_are_rejected(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "i.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"i\.npz: "):
        load_codec(tmp_path, IMAGE)


def test_prompt_that_is_not_utf8_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(train_text_codebook(TEXTS, 400, SPECIAL))
    codec = load_codec(tmp_path, TEXT)
    assert isinstance(codec, TextCodec)
    with pytest.raises(DataError, match="not UTF-8 at position 1"):
        codec.encode("a\udcff")
