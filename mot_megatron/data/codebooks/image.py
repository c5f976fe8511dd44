"""Pictures of 32x32 pixels as 64 codes: each patch of 4x4 pixels becomes its nearest centroid.

Shapes: n pictures of g x g patches, d = 48 values per patch.
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
"""Number of patches per row and column."""
TOKENS_PER_PICTURE = GRID * GRID
_WIDTH = PATCH_PIXELS * PATCH_PIXELS * 3
_BRIGHT = 250
"""A patch whose darkest value exceeds this is background."""
_BACKGROUND_PATCHES = 2000
"""Background patches used in training. Half of all patches are background, but they need only one
centroid."""
_TRAINING_PATCHES = 150_000


def split_patches(pictures: np.ndarray) -> np.ndarray:
    """Cut pictures [n, 32, 32, 3] into patches [n * 64, 48] float32, in reading order."""
    shape = (-1, GRID, PATCH_PIXELS, GRID, PATCH_PIXELS, 3)
    patches = pictures.reshape(shape).transpose(0, 1, 3, 2, 4, 5)
    return patches.reshape(-1, _WIDTH).astype(np.float32)


def join_patches(patches: np.ndarray) -> np.ndarray:
    """Invert ``split_patches``, keeping the dtype."""
    grid = patches.reshape(-1, GRID, GRID, PATCH_PIXELS, PATCH_PIXELS, 3)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(-1, PICTURE_PIXELS, PICTURE_PIXELS, 3)


def train_image_codebook(pictures: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Train the centroids of ``PatchCodec``.

    Args:
        pictures: [n, 32, 32, 3] uint8, of the training split only.
        count: Number of codes.
        seed: Seed for the choice and order of training patches.

    Returns:
        [count, 48] float32.

    Raises:
        DataError: There are too few patches for ``count`` codes.
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
    """Compute the peak signal-to-noise ratio of each picture in dB.

    Args:
        pictures: [n, 32, 32, 3] uint8.
        reconstructions: The same shape and type.

    Returns:
        [n] float64; a perfect reconstruction counts as an error of 0.01 gray levels.
    """
    error = pictures.astype(np.float64) - reconstructions
    squared = np.maximum((error**2).mean(axis=(1, 2, 3)), 1e-4)
    return 10 * np.log10(255**2 / squared)


class PatchCodec(Codec):
    """Converts between 64 ids and a picture, uint8 [32, 32, 3]."""

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
        """Return the content of the codebook file."""
        return pack_arrays(centroids=self.centroids)

    def encode(self, pictures: np.ndarray) -> np.ndarray:
        """Encode pictures [n, 32, 32, 3] uint8 to ids [n, 64] int64."""
        codes = nearest_centroids(split_patches(pictures), self.centroids)
        return codes.reshape(-1, TOKENS_PER_PICTURE) + self.modality.first_id

    def decode(self, token_ids: TokenIds) -> np.ndarray:
        """Decode exactly 64 ids to a picture, uint8 [32, 32, 3]."""
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
