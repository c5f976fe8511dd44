"""Convert drawings and photographs to small square pictures on white, and augment them."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from mot_megatron.data.builders.packages import optional_package
from mot_megatron.data.codebooks.image import PICTURE_PIXELS
from mot_megatron.errors import DataError

MASTER_PIXELS = 64
"""Width and height of a master, the image from which each document's picture is scaled down."""
_RENDERED_PIXELS = 80
_SMALLEST_PIXELS = 26
_STRETCH = (0.8, 1.2)
"""Range of the scale of a strongly varied picture; parts beyond the edge are cut off."""
_ASPECT, _TURN_DEGREES, _SHIFT = 0.1, 14.0, 0.12
_INK, _BLEND = (0.55, 1.1), 0.3
_DOTS_PER_INCH = 96.0  # resvg fails on SVGs sized in points without it


def render_svg(content: str, source: str) -> np.ndarray:
    """Render an SVG to a master, uint8 [64, 64, 3].

    Raises:
        DataError: The SVG cannot be rendered or is empty; the message names ``source``.
    """
    resvg = optional_package("resvg_py", "resvg_py")
    try:
        png = resvg.svg_to_bytes(
            svg_string=content,
            width=_RENDERED_PIXELS,
            dpi=_DOTS_PER_INCH,
            # With system fonts, the corpus would depend on the machine it is built on.
            skip_system_fonts=True,
        )
    except ValueError as error:
        raise DataError(f"{source}: cannot be rendered: {error}") from None
    return read_picture(bytes(png), source)


def read_picture(content: bytes, source: str) -> np.ndarray:
    """Read an image file as a master, uint8 [64, 64, 3], cropped and centered on white.

    Raises:
        DataError: The content is not an image or is fully transparent; the message names
            ``source``.
    """
    try:
        with Image.open(io.BytesIO(content)) as opened:
            image = opened.convert("RGBA")
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"{source}: not an image: {error}") from None
    box = image.getchannel("A").getbbox()
    if box is None:
        raise DataError(f"{source}: the picture is fully transparent")
    cropped = image.crop(box)
    side = max(cropped.size)
    square = Image.new("RGBA", (side, side), "white")
    corner = ((side - cropped.width) // 2, (side - cropped.height) // 2)
    square.alpha_composite(cropped, corner)
    small = square.convert("RGB").resize((MASTER_PIXELS, MASTER_PIXELS), Image.Resampling.LANCZOS)
    return np.asarray(small)


def vary_picture(master: np.ndarray, random: np.random.Generator, *, mirror: bool) -> np.ndarray:
    """Scale a master to a random size of 26 to 32 pixels at a random position on white.

    Args:
        master: uint8 [64, 64, 3].
        random: Generator for size, position and mirroring.
        mirror: Whether the picture may be mirrored (it contains no writing).

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


def vary_strongly(master: np.ndarray, random: np.random.Generator, *, mirror: bool) -> np.ndarray:
    """Augment a master for training: stretch, rotate, shift and recolor it on white.

    Args:
        master: uint8 [64, 64, 3].
        random: Generator for all choices.
        mirror: Whether the picture may also be mirrored.

    Returns:
        uint8 [32, 32, 3].
    """
    moved = _move(Image.fromarray(master), random, mirror=mirror)
    small = moved.resize((PICTURE_PIXELS, PICTURE_PIXELS), Image.Resampling.BOX)
    return _color(np.asarray(small), random)


def _move(image: Image.Image, random: np.random.Generator, *, mirror: bool) -> Image.Image:
    scale = random.uniform(*_STRETCH)
    across, down = scale * random.uniform(1 - _ASPECT, 1 + _ASPECT, size=2)
    angle = np.deg2rad(random.uniform(-_TURN_DEGREES, _TURN_DEGREES))
    shift = random.uniform(-_SHIFT, _SHIFT, size=2) * MASTER_PIXELS
    if mirror and random.random() < 0.5:
        across = -across
    # PIL takes the map from output to input coordinates: p = A (q - middle - shift) + middle, where
    # A inverts the stretch and the rotation.
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    matrix = np.diag([1 / across, 1 / down]) @ turn
    middle = np.full(2, MASTER_PIXELS / 2)
    offset = middle - matrix @ (middle + shift)
    coefficients = (*matrix[0], offset[0], *matrix[1], offset[1])
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        tuple(float(value) for value in coefficients),
        resample=Image.Resampling.BILINEAR,
        fillcolor="white",
    )


def _color(picture: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Change the colors of a picture [h, w, 3]; white stays white and gray stays gray."""
    order, blend = random.permutation(3), random.uniform(0, _BLEND)
    mixing = (1 - blend) * np.eye(3) + blend * np.eye(3)[order]
    ink = (255.0 - picture) @ mixing * random.uniform(*_INK)
    return np.clip(np.rint(255.0 - ink), 0, 255).astype(np.uint8)
