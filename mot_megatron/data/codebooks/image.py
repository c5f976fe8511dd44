"""Pictures as a raster of 64 codes: 32x32 pixels, cut into 4x4 patches, each its nearest centroid.

Shapes: n pictures, g x g patches each, d = 48 values of a patch.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from mot_megatron.data.codebooks.codec import Codec, TokenIds, pack_arrays, read_arrays
from mot_megatron.data.codebooks.kmeans import nearest_centroids, train_centroids
from mot_megatron.data.corpus import Modality
from mot_megatron.errors import DataError

PICTURE_PIXELS = 32
"""Width and height of a picture."""
PATCH_PIXELS = 4
GRID = PICTURE_PIXELS // PATCH_PIXELS
"""Patches in a row, and rows."""
TOKENS_PER_PICTURE = GRID * GRID
_WIDTH = PATCH_PIXELS * PATCH_PIXELS * 3
_BRIGHT = 250
"""A patch whose darkest value is above this is background."""
_BACKGROUND_PATCHES = 2000
"""Background patches kept for training: half of all patches are, and one centroid serves them."""
_TRAINING_PATCHES = 150_000


def split_patches(pictures: np.ndarray) -> np.ndarray:
    """[n, 32, 32, 3] -> [n * 64, 48] float32, patches in reading order."""
    shape = (-1, GRID, PATCH_PIXELS, GRID, PATCH_PIXELS, 3)
    patches = pictures.reshape(shape).transpose(0, 1, 3, 2, 4, 5)
    return patches.reshape(-1, _WIDTH).astype(np.float32)


def join_patches(patches: np.ndarray) -> np.ndarray:
    """The inverse of ``split_patches``, in the dtype of ``patches``."""
    grid = patches.reshape(-1, GRID, GRID, PATCH_PIXELS, PATCH_PIXELS, 3)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(-1, PICTURE_PIXELS, PICTURE_PIXELS, 3)


def train_image_codebook(pictures: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Centroids for ``PatchCodec``.

    Args:
        pictures: [n, 32, 32, 3] uint8, of the training split only.
        count: How many codes.
        seed: Chooses the patches trained on and their order.

    Returns:
        [count, 48] float32.

    Raises:
        DataError: Too few patches for that many codes.
    """
    random = np.random.default_rng(seed)
    patches = split_patches(pictures)
    background = patches.min(axis=1) > _BRIGHT
    kept = np.concatenate(
        [np.flatnonzero(~background), np.flatnonzero(background)[:_BACKGROUND_PATCHES]]
    )
    chosen = random.permutation(kept)[:_TRAINING_PATCHES]
    return train_centroids(patches[chosen], count, seed, "image codebook")


def peak_signal_to_noise(pictures: np.ndarray, reconstructions: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each picture in dB.

    Args:
        pictures: [n, 32, 32, 3] uint8.
        reconstructions: The same shape and type.

    Returns:
        [n] float64; a perfect reconstruction counts as an error of 0.01 grey levels.
    """
    error = pictures.astype(np.float64) - reconstructions
    squared = np.maximum((error**2).mean(axis=(1, 2, 3)), 1e-4)
    return 10 * np.log10(255**2 / squared)


class PatchCodec(Codec):
    """64 ids <-> one picture, uint8 [32, 32, 3]."""

    suffix = ".png"
    row_length = GRID
    tokens_per_item = TOKENS_PER_PICTURE

    def __init__(self, modality: Modality, centroids: np.ndarray) -> None:
        super().__init__(modality)
        self.centroids = centroids

    @classmethod
    def load(cls, path: Path, modality: Modality) -> PatchCodec:
        """As ``Codec.load``."""
        arrays = read_arrays(path, {"centroids": (modality.size, _WIDTH)})
        return cls(modality, arrays["centroids"])

    def save(self) -> bytes:
        """The codebook file's content."""
        return pack_arrays(centroids=self.centroids)

    def encode(self, pictures: np.ndarray) -> np.ndarray:
        """[n, 32, 32, 3] uint8 -> ids [n, 64] int64."""
        codes = nearest_centroids(split_patches(pictures), self.centroids)
        return codes.reshape(-1, TOKENS_PER_PICTURE) + self.modality.first_id

    def decode(self, token_ids: TokenIds) -> np.ndarray:
        """The picture of exactly 64 ids, uint8 [32, 32, 3]."""
        codes = self.codes(token_ids)
        if len(codes) != TOKENS_PER_PICTURE:
            raise DataError(
                f"a picture of {len(codes)} tokens, expected exactly {TOKENS_PER_PICTURE}"
            )
        pixels = join_patches(self.centroids[codes])[0]
        return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)

    def write(self, token_ids: TokenIds, path: Path) -> None:
        """Write the picture as a .png."""
        Image.fromarray(self.decode(token_ids)).save(path)
