"""Pictures of any size and mode, sound of any rate."""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile
from PIL import Image

from mot_megatron.data.documents.decode import decode_picture, decode_sound
from mot_megatron.data.documents.raw import BrokenItemError, Media

MEDIA = Media("some.file", b"")


def encoded(image: Image.Image, name: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=name, **options)
    return stream.getvalue()


@pytest.mark.parametrize("size", [(32, 32), (100, 40), (3, 200), (1, 1)])
def test_the_middle_square_is_kept(size: tuple[int, int]) -> None:
    """The ends of a picture are red, its middle square is blue."""
    image = Image.new("RGB", size, "red")
    (width, height), side = size, min(size)
    corner = ((width - side) // 2, (height - side) // 2)
    image.paste("blue", (*corner, corner[0] + side, corner[1] + side))
    picture = decode_picture(MEDIA, encoded(image))
    assert picture.shape == (32, 32, 3)
    assert picture.dtype == np.uint8
    assert (picture == (0, 0, 255)).all()


def test_modes() -> None:
    clear = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    assert (decode_picture(MEDIA, encoded(clear)) == 255).all()
    half = Image.new("RGBA", (40, 40), (0, 0, 0, 128))
    assert (abs(decode_picture(MEDIA, encoded(half)).astype(int) - 127) <= 1).all()
    deep = Image.fromarray(np.full((40, 40), 0x8000, np.uint16))
    assert (decode_picture(MEDIA, encoded(deep)) == 0x80).all()
    palette = Image.new("RGB", (40, 40), (10, 200, 30)).quantize(4)
    assert (decode_picture(MEDIA, encoded(palette)) == (10, 200, 30)).all()
    bands = np.zeros((40, 40, 3), np.uint8)
    bands[:20] = 255
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: to be turned by a quarter, clockwise
    picture = decode_picture(MEDIA, encoded(Image.fromarray(bands), exif=turned))
    assert picture[:, 20:].min() > 200
    assert picture[:, :12].max() < 50


@pytest.mark.parametrize(
    "content",
    [b"", b"text", encoded(Image.new("RGB", (64, 64), "red"))[:60],
     encoded(Image.new("F", (4, 4)), "TIFF")],
)  # fmt: skip
def test_broken_pictures(content: bytes) -> None:
    with pytest.raises(BrokenItemError, match=r"some.file: "):
        decode_picture(MEDIA, content)


def tone(rate: int, seconds: float, name: str = "WAV", subtype: str = "FLOAT") -> bytes:
    """Encode 440 Hz of amplitude 0.5 in the first of two channels."""
    time = np.arange(round(seconds * rate)) / rate
    sine = 0.5 * np.sin(2 * np.pi * 440 * time)
    stream = io.BytesIO()
    soundfile.write(stream, np.stack([sine, 0 * sine], 1), rate, format=name, subtype=subtype)
    return stream.getvalue()


def test_opaque_pictures_are_as_those_over_white() -> None:
    """A picture without transparency takes a shorter way to the same pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (70, 90, 4), dtype=np.uint8)
    pixels[..., 3] = 255
    contents = []
    for image in (Image.fromarray(pixels), Image.fromarray(pixels).convert("RGB")):
        stream = io.BytesIO()
        image.save(stream, "PNG")
        contents.append(stream.getvalue())
    transparent, opaque = (decode_picture(MEDIA, content) for content in contents)
    assert np.array_equal(transparent, opaque)


@pytest.mark.parametrize("rate", [8000, 16_000, 22_050, 48_000])
@pytest.mark.parametrize("encoding", [("WAV", "FLOAT"), ("FLAC", "PCM_16")])
def test_rates_and_channels(rate: int, encoding: tuple[str, str]) -> None:
    samples = decode_sound(MEDIA, tone(rate, 0.5, *encoding))
    assert abs(len(samples) - 8000) <= 1
    expected = 0.25 * np.sin(2 * np.pi * 440 * np.arange(len(samples)) / 16_000)
    inside = slice(400, -400)
    assert np.abs(samples[inside] - expected[inside]).max() < 0.01


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a readable sound"),
        (b"text" * 99, "not a readable sound"),
        (tone(8000, 0.1), "shorter than 0.2 s"),
        (tone(8000, 0.0), "shorter than 0.2 s"),
        (tone(100, 3601.0), "a sound of 3601 s at 100 Hz"),
    ],
)
def test_broken_sounds(content: bytes, message: str) -> None:
    with pytest.raises(BrokenItemError) as raised:
        decode_sound(MEDIA, content)
    assert str(raised.value).startswith("some.file: ")
    assert message in str(raised.value)


def test_sounds_of_no_number() -> None:
    stream = io.BytesIO()
    soundfile.write(stream, np.full(8000, np.nan), 16_000, format="WAV", subtype="FLOAT")
    with pytest.raises(BrokenItemError, match="not finite"):
        decode_sound(MEDIA, stream.getvalue())
