"""Pictures as patches, each of which becomes its nearest centroid.

Shapes: n pictures of p x p pixels in g x g patches of q x q pixels, d = 3 q^2 values per patch. By
default p = 32, g = 8, q = 4 and d = 48.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from mot_megatron.data.codebooks.arrays import array_shapes, pack_arrays, read_arrays
from mot_megatron.data.codebooks.codec import PictureCodec
from mot_megatron.data.codebooks.kmeans import nearest_centroids, train_centroids
from mot_megatron.data.corpus import Modality
from mot_megatron.errors import DataError

PICTURE_PIXELS = 32
"""Width and height of a picture, unless a codebook has another size."""
PATCH_PIXELS = 4
"""Width and height of a patch, unless a codebook has another size."""
LARGEST_PIXELS = 4096
_BRIGHT = 250
"""A patch whose darkest value exceeds this is background."""
_BACKGROUND_PATCHES = 2000
"""Background patches used in training. Half of all patches are background, but they need only one
centroid."""
_TRAINING_PATCHES = 150_000


def split_patches(pictures: np.ndarray, patch: int = PATCH_PIXELS) -> np.ndarray:
    """Cut pictures [n, p, p, 3] into patches [n * g * g, d] float32, in reading order."""
    grid = pictures.shape[1] // patch
    patches = pictures.reshape(-1, grid, patch, grid, patch, 3).transpose(0, 1, 3, 2, 4, 5)
    return patches.reshape(-1, 3 * patch * patch).astype(np.float32)


def join_patches(patches: np.ndarray, grid: int = PICTURE_PIXELS // PATCH_PIXELS) -> np.ndarray:
    """Invert ``split_patches``, keeping the dtype."""
    patch = math.isqrt(patches.shape[-1] // 3)
    pictures = patches.reshape(-1, grid, grid, patch, patch, 3).transpose(0, 1, 3, 2, 4, 5)
    return pictures.reshape(-1, grid * patch, grid * patch, 3)


def train_image_codebook(
    pictures: np.ndarray, count: int, seed: int, patch: int = PATCH_PIXELS
) -> np.ndarray:
    """Train the centroids of ``PatchCodec``.

    Args:
        pictures: [n, p, p, 3] uint8, of the training split only.
        count: Number of codes.
        seed: Seed for the choice and order of training patches.
        patch: q, width and height of a patch in pixels.

    Returns:
        [count, d] float32.

    Raises:
        DataError: There are too few patches for ``count`` codes.
    """
    random = np.random.default_rng(seed)
    patches = split_patches(pictures, patch)
    background = patches.min(axis=1) > _BRIGHT
    kept = np.concatenate(
        [np.flatnonzero(~background), np.flatnonzero(background)[:_BACKGROUND_PATCHES]]
    )
    chosen = random.permutation(kept)[:_TRAINING_PATCHES]
    return train_centroids(patches[chosen], count, seed, "image codebook")


def peak_signal_to_noise(pictures: np.ndarray, reconstructions: np.ndarray) -> np.ndarray:
    """Compute the peak signal-to-noise ratio of each picture in dB.

    Args:
        pictures: [n, p, p, 3] uint8.
        reconstructions: The same shape and type.

    Returns:
        [n] float64; a perfect reconstruction counts as an error of 0.01 gray levels.
    """
    error = pictures.astype(np.float64) - reconstructions
    squared = np.maximum((error**2).mean(axis=(1, 2, 3)), 1e-4)
    return 10 * np.log10(255**2 / squared)


class PatchCodec(PictureCodec):
    """Encodes each patch as its nearest centroid."""

    def __init__(
        self, modality: Modality, centroids: np.ndarray, pixels: int = PICTURE_PIXELS
    ) -> None:
        super().__init__(modality)
        self.centroids = centroids
        self.pixels = pixels
        self.patch = math.isqrt(centroids.shape[1] // 3)
        self.grid = pixels // self.patch

    @classmethod
    def load(cls, path: Path, modality: Modality) -> PatchCodec:
        """As ``Codec.load``."""
        found = array_shapes(path)
        shapes: dict[str, tuple[int, ...]] = {"centroids": (modality.size, _width(path, found))}
        if "pixels" not in found:
            return cls(modality, read_arrays(path, shapes)["centroids"])
        arrays = read_arrays(path, shapes | {"pixels": (1,)})
        codec = cls(modality, arrays["centroids"], int(arrays["pixels"][0]))
        check_grid(codec.pixels, codec.patch, str(path))
        return codec

    @classmethod
    def count_codes(cls, path: Path) -> int:
        """As ``Codec.count_codes``."""
        found = array_shapes(path)
        _width(path, found)
        return found["centroids"][0]

    def save(self) -> bytes:
        """Return the content of the codebook file."""
        if self.pixels == PICTURE_PIXELS:
            return pack_arrays(centroids=self.centroids)
        return pack_arrays(centroids=self.centroids, pixels=np.array([self.pixels]))

    def encode_pictures(self, pictures: np.ndarray) -> np.ndarray:
        """As ``PictureCodec.encode_pictures``."""
        codes = nearest_centroids(split_patches(pictures, self.patch), self.centroids)
        return codes.reshape(-1, self.tokens_per_item)

    def decode_codes(self, codes: np.ndarray) -> np.ndarray:
        """As ``PictureCodec.decode_codes``."""
        pixels = join_patches(self.centroids[codes], self.grid)
        return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def _width(path: Path, shapes: dict[str, tuple[int, ...]]) -> int:
    """Return the number of values per patch, given what the file says it contains."""
    shape = shapes.get("centroids", ())
    patch = math.isqrt(shape[1] // 3) if len(shape) == 2 else 0
    if not 0 < patch <= LARGEST_PIXELS or shape[1] != 3 * patch * patch:
        raise DataError(
            f"{path}: contains arrays of shapes {shapes}, expected centroids of shape [codes, 3 q "
            "q] for patches of q x q pixels"
        )
    return shape[1]


def check_grid(pixels: int, patch: int, source: str) -> None:
    """Check that pictures divide into patches.

    Raises:
        DataError: They do not, or are too large; the message begins with ``source``.
    """
    if not 0 < patch <= pixels <= LARGEST_PIXELS or pixels % patch:
        raise DataError(
            f"{source}: pictures of {pixels} pixels a side in patches of {patch}, expected a "
            f"multiple of the patch and at most {LARGEST_PIXELS}"
        )
