"""Decode a document: pictures of any size to 32 x 32 pixels, sound of any rate to 16 kHz."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import soundfile
from PIL import Image, ImageOps, UnidentifiedImageError

from mot_megatron.data.builders.randomness import is_in_share
from mot_megatron.data.codebooks.image import PICTURE_PIXELS
from mot_megatron.data.codebooks.mel import resample
from mot_megatron.data.codebooks.speech import SpeechFeatures, speech_features
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


@dataclass(frozen=True)
class DecodedSegment:
    """A segment whose content can be encoded."""

    kind: str
    """Name of the modality."""
    content: str | np.ndarray | SpeechFeatures
    """Text, picture uint8 [32, 32, 3], or features of a sound."""
    language: str | None
    context: bool = False
    """Whether nothing is trained to predict it."""


@dataclass(frozen=True)
class DecodedDocument:
    """A document whose segments can be encoded."""

    segments: tuple[DecodedSegment, ...]
    held_out: bool
    """Whether it belongs to the validation split."""


def decode_document(document: RawDocument, validation_share: float) -> DecodedDocument:
    """Read and decode the segments of a document; empty texts are left out.

    Args:
        document: As read from a source.
        validation_share: Share of the documents in the validation split, which the document's key
            or content decides, whatever else there is.

    Raises:
        BrokenItemError: The document or one of its segments cannot be used, or all are empty.
    """
    if document.problem is not None:
        raise BrokenItemError(document.problem)
    segments, contents = [], []
    for segment in document.segments:
        content: str | bytes
        decoded: str | np.ndarray | SpeechFeatures
        if isinstance(segment.content, str):
            content = decoded = segment.content
        else:
            content = segment.content.read()
            if segment.kind == IMAGE:
                decoded = decode_picture(segment.content, content)
            else:
                decoded = decode_speech(segment.content, content)
        contents.append((segment.kind, content))
        if not isinstance(decoded, str) or decoded:
            segments.append(
                DecodedSegment(segment.kind, decoded, segment.language, segment.context)
            )
    if not segments:
        raise BrokenItemError("the text is empty, and there is nothing else")
    key = content_digest(contents) if document.key is None else document.key
    return DecodedDocument(tuple(segments), is_in_share(key, validation_share))


def decode_picture(media: Media, content: bytes) -> np.ndarray:
    """Decode a picture.

    It is turned as its EXIF data says, placed over white where it is transparent, cut to the
    largest square in its middle, and reduced or enlarged by Lanczos filtering.

    Args:
        media: Names the picture in messages.
        content: PNG, JPEG or another format that Pillow reads; the first frame is used.

    Returns:
        uint8 [32, 32, 3].

    Raises:
        BrokenItemError: The content is not a picture, is damaged or is suspiciously large.
    """
    try:
        with Image.open(io.BytesIO(content)) as opened:
            image = _eight_bits(ImageOps.exif_transpose(opened), media).convert("RGBA")
    except (
        UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError,
    ) as error:  # fmt: skip
        raise BrokenItemError(f"{media.name}: not a readable picture: {_line(error)}") from None
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    paper = Image.new("RGBA", square.size, "white")
    paper.alpha_composite(square)
    size = (PICTURE_PIXELS, PICTURE_PIXELS)
    return np.asarray(paper.convert("RGB").resize(size, Image.Resampling.LANCZOS))


def _eight_bits(image: Image.Image, media: Media) -> Image.Image:
    if image.mode.startswith("I;16"):
        # Pillow would clip 16-bit gray levels at 255.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise BrokenItemError(f"{media.name}: a picture of mode {image.mode}, expected 8 or 16 bit")
    return image


def decode_sound(media: Media, content: bytes) -> np.ndarray:
    """Decode a sound to the mean of its channels, [n] float32 at 16 kHz.

    Args:
        media: Names the sound in messages.
        content: WAV, FLAC, Ogg, MP3 or another format that libsndfile reads.

    Raises:
        BrokenItemError: The content is not a sound, is damaged, is longer than an hour or contains
            values that are not finite.
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
    return resample(samples.mean(axis=1), rate)


def decode_speech(media: Media, content: bytes) -> SpeechFeatures:
    """Decode a sound to the features that are encoded.

    Raises:
        BrokenItemError: As ``decode_sound``, or the sound is shorter than 0.2 s.
    """
    features = speech_features(decode_sound(media, content))
    if not len(features.units):
        raise BrokenItemError(f"{media.name}: a sound shorter than 0.2 s")
    return features


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
