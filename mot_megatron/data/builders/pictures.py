"""Drawings and photographs as small square pictures on white, and their variation."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from mot_megatron.data.builders.packages import optional_package
from mot_megatron.data.codebooks.image import PICTURE_PIXELS
from mot_megatron.errors import DataError

MASTER_PIXELS = 64
"""Width and height of a master, from which every document's picture is scaled down."""
_RENDERED_PIXELS = 80
_SMALLEST_PIXELS = 26
_DOTS_PER_INCH = 96.0  # resvg fails on SVGs sized in points without it


def render_svg(content: str, source: str) -> np.ndarray:
    """Draw an SVG as a master, uint8 [64, 64, 3].

    Raises:
        DataError: It cannot be drawn, or is empty; the message names ``source``.
    """
    resvg = optional_package("resvg_py", "resvg_py")
    try:
        png = resvg.svg_to_bytes(svg_string=content, width=_RENDERED_PIXELS, dpi=_DOTS_PER_INCH)
    except ValueError as error:
        raise DataError(f"{source}: cannot be drawn: {error}") from None
    return read_picture(bytes(png), source)


def read_picture(content: bytes, source: str) -> np.ndarray:
    """Read an image file as a master, uint8 [64, 64, 3]: cropped, centred, on white.

    Raises:
        DataError: Not an image, or fully transparent; the message names ``source``.
    """
    try:
        with Image.open(io.BytesIO(content)) as opened:
            image = opened.convert("RGBA")
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"{source}: not an image: {error}") from None
    box = image.getchannel("A").getbbox()
    if box is None:
        raise DataError(f"{source}: nothing to see, fully transparent")
    cropped = image.crop(box)
    side = max(cropped.size)
    square = Image.new("RGBA", (side, side), "white")
    corner = ((side - cropped.width) // 2, (side - cropped.height) // 2)
    square.alpha_composite(cropped, corner)
    small = square.convert("RGB").resize((MASTER_PIXELS, MASTER_PIXELS), Image.Resampling.LANCZOS)
    return np.asarray(small)


def vary_picture(master: np.ndarray, random: np.random.Generator, *, mirror: bool) -> np.ndarray:
    """One document's picture: scaled to 26..32 pixels and put somewhere on white.

    Args:
        master: uint8 [64, 64, 3].
        random: Chooses size and place.
        mirror: Whether it may also be mirrored (no writing in it).

    Returns:
        uint8 [32, 32, 3].
    """
    image = Image.fromarray(master)
    side = int(random.integers(_SMALLEST_PIXELS, PICTURE_PIXELS + 1))
    left, top = random.integers(0, PICTURE_PIXELS - side + 1, size=2)
    if mirror and random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    picture = np.full((PICTURE_PIXELS, PICTURE_PIXELS, 3), 255, np.uint8)
    small = image.resize((side, side), Image.Resampling.BOX)
    picture[top : top + side, left : left + side] = np.asarray(small)
    return picture
