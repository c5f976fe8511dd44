"""Decode a document: pictures of any size and sound of any rate to those of the codecs."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Literal

import numpy as np
import soundfile
from PIL import Image, ImageOps, UnidentifiedImageError

from mot_megatron.data.builders.randomness import is_in_share
from mot_megatron.data.codebooks.image import PICTURE_PIXELS
from mot_megatron.data.codebooks.mel import SAMPLE_RATE, resample
from mot_megatron.data.documents.raw import (
    BrokenItemError,
    Media,
    RawDocument,
    content_digest,
)
from mot_megatron.data.structure import IMAGE

LONGEST_SOUND_SECONDS = 3600
"""Longest sound that is decoded, since it is decoded as a whole."""
_HIGHEST_RATE = 768_000
Fit = Literal["crop", "pad"]


@dataclass(frozen=True)
class MediaFormat:
    """What pictures and sounds are converted to."""

    pixels: int = PICTURE_PIXELS
    """Width and height of a picture."""
    sample_rate: int = SAMPLE_RATE
    """Samples per second of a sound."""
    shortest_seconds: float = 0.2
    """Shortest sound that can be encoded."""
    fit: Fit = "crop"
    """How a picture becomes a square: the largest square in its middle, or the whole picture in the
    middle of a white square."""


DEFAULT_FORMAT = MediaFormat()


@dataclass(frozen=True)
class DecodedSegment:
    """A segment whose content can be encoded."""

    kind: str
    """Name of the modality."""
    content: str | np.ndarray
    """Text, picture uint8 [p, p, 3], or sound float32 [n]."""
    language: str | None
    context: bool = False
    """Whether nothing is trained to predict it."""


@dataclass(frozen=True)
class DecodedDocument:
    """A document whose segments can be encoded."""

    segments: tuple[DecodedSegment, ...]
    held_out: bool
    """Whether it belongs to the validation split."""


def decode_document(
    document: RawDocument, validation_share: float, form: MediaFormat
) -> DecodedDocument:
    """Read and decode the segments of a document; empty texts are left out.

    Args:
        document: As read from a source.
        validation_share: Share of the documents in the validation split, which the document's key
            or content decides, whatever else there is.
        form: What pictures and sounds are converted to.

    Raises:
        BrokenItemError: The document or one of its segments cannot be used, or all are empty.
    """
    if document.problem is not None:
        raise BrokenItemError(document.problem)
    segments, contents = [], []
    for segment in document.segments:
        content: str | bytes
        decoded: str | np.ndarray
        if isinstance(segment.content, str):
            content = decoded = segment.content
        else:
            content = segment.content.read()
            if segment.kind == IMAGE:
                decoded = decode_picture(segment.content, content, form)
            else:
                decoded = decode_sound(segment.content, content, form)
        contents.append((segment.kind, content))
        if not isinstance(decoded, str) or decoded:
            segments.append(
                DecodedSegment(segment.kind, decoded, segment.language, segment.context)
            )
    if not segments:
        raise BrokenItemError("the text is empty, and there is nothing else")
    key = content_digest(contents) if document.key is None else document.key
    return DecodedDocument(tuple(segments), is_in_share(key, validation_share))


def decode_picture(media: Media, content: bytes, form: MediaFormat = DEFAULT_FORMAT) -> np.ndarray:
    """Decode a picture.

    It is turned as its EXIF data says, placed over white where it is transparent, cut or padded to
    a square, and reduced or enlarged by Lanczos filtering.

    Args:
        media: Names the picture in messages.
        content: PNG, JPEG or another format that Pillow reads; the first frame is used.
        form: Size of the result, and how it becomes a square.

    Returns:
        uint8 [p, p, 3].

    Raises:
        BrokenItemError: The content is not a picture, is damaged or is suspiciously large.
    """
    try:
        with Image.open(io.BytesIO(content)) as opened:
            image = _eight_bits(ImageOps.exif_transpose(opened), media)
            # Opaque pictures need no paper, which takes a third of the time.
            is_opaque = image.mode == "RGB" and "transparency" not in image.info
            image = image.convert("RGB" if is_opaque and form.fit == "crop" else "RGBA")
    except (
        UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError,
    ) as error:  # fmt: skip
        raise BrokenItemError(f"{media.name}: not a readable picture: {_line(error)}") from None
    side = min(image.size) if form.fit == "crop" else max(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    # Beyond its borders, a picture is transparent.
    square = image.crop((left, top, left + side, top + side))
    if square.mode == "RGBA":
        paper = Image.new("RGBA", square.size, "white")
        paper.alpha_composite(square)
        square = paper.convert("RGB")
    size = (form.pixels, form.pixels)
    return np.asarray(square.resize(size, Image.Resampling.LANCZOS))


def _eight_bits(image: Image.Image, media: Media) -> Image.Image:
    if image.mode.startswith("I;16"):
        # Pillow would clip 16-bit gray levels at 255.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise BrokenItemError(f"{media.name}: a picture of mode {image.mode}, expected 8 or 16 bit")
    return image


def decode_sound(media: Media, content: bytes, form: MediaFormat = DEFAULT_FORMAT) -> np.ndarray:
    """Decode a sound to the mean of its channels, [n] float32 at the rate of ``form``.

    Args:
        media: Names the sound in messages.
        content: WAV, FLAC, Ogg, MP3 or another format that libsndfile reads.
        form: Rate of the result, and its least length.

    Raises:
        BrokenItemError: The content is not a sound, is damaged, is too short or longer than an
            hour, or contains values that are not finite.
    """
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as opened:
            seconds = opened.frames / opened.samplerate
            if not 0 <= seconds <= LONGEST_SOUND_SECONDS or opened.samplerate > _HIGHEST_RATE:
                raise BrokenItemError(
                    f"{media.name}: a sound of {seconds:.0f} s at {opened.samplerate} Hz, expected "
                    f"at most {LONGEST_SOUND_SECONDS} s and {_HIGHEST_RATE} Hz"
                )
            samples, rate = opened.read(dtype="float32", always_2d=True), opened.samplerate
    except (soundfile.LibsndfileError, OSError, RuntimeError, ValueError) as error:
        raise BrokenItemError(f"{media.name}: not a readable sound: {_line(error)}") from None
    if not np.isfinite(samples).all():
        raise BrokenItemError(f"{media.name}: a sound with values that are not finite")
    decoded = resample(samples.mean(axis=1), rate, form.sample_rate)
    if len(decoded) < form.shortest_seconds * form.sample_rate:
        raise BrokenItemError(f"{media.name}: a sound shorter than {form.shortest_seconds:g} s")
    return decoded


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
