"""Quantizers between the vectors of an encoder and codes.

Shapes: m vectors of width d.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

_ROWS = 1 << 14
"""Vectors that are compared with all codes at a time."""
_FSQ_EPS = 1e-3


class Quantizer(ABC):
    """Maps vectors [m, d] fp32 to codes [m] int64 and codes to the vectors that they stand for."""

    num_codes: int
    width: int
    """d."""

    @abstractmethod
    def encode(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return the codes of vectors."""

    @abstractmethod
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the vectors of codes."""


class NearestEntry(Quantizer):
    """The nearest entry of a table, as in VQ-VAE (van den Oord et al., arXiv 1711.00937)."""

    def __init__(self, table: torch.Tensor) -> None:
        self.table = table
        self.num_codes, self.width = table.shape

    def encode(self, vectors: torch.Tensor) -> torch.Tensor:
        """As ``Quantizer.encode``."""
        # |v - e|^2 = |v|^2 + |e|^2 - 2 v.e, and |v|^2 is the same for every entry
        squares = self.table.square().sum(1)
        parts = vectors.split(_ROWS)
        return torch.cat([(squares - 2 * part @ self.table.t()).argmin(1) for part in parts])

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """As ``Quantizer.decode``."""
        return self.table[codes]


class Signs(Quantizer):
    """Lookup-free quantization (Yu et al., arXiv 2310.05737): the signs of the components.

    The first component gives the most significant bit.
    """

    def __init__(self, width: int) -> None:
        self.num_codes, self.width = 2**width, width
        self.bits = 2 ** torch.arange(width - 1, -1, -1)

    def encode(self, vectors: torch.Tensor) -> torch.Tensor:
        """As ``Quantizer.encode``."""
        return ((vectors > 0) * self.bits.to(vectors.device)).sum(1)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """As ``Quantizer.decode``."""
        return torch.where(codes[:, None] & self.bits.to(codes.device) > 0, 1.0, -1.0)


class Levels(Quantizer):
    """Finite scalar quantization (Mentzer et al., arXiv 2309.15505): components are rounded.

    Each has a few levels; the first component gives the least significant digit.
    """

    def __init__(self, levels: Sequence[int]) -> None:
        self.num_codes, self.width = math.prod(levels), len(levels)
        self.levels = torch.tensor(levels)
        self.places = torch.tensor([1, *levels[:-1]]).cumprod(0)

    def encode(self, vectors: torch.Tensor) -> torch.Tensor:
        """As ``Quantizer.encode``."""
        levels = self.levels.to(vectors.device)
        half = (levels - 1) * (1 + _FSQ_EPS) / 2
        offset = torch.where(levels % 2 == 0, 0.5, 0.0)
        bounded = (vectors + (offset / half).atanh()).tanh() * half - offset
        return ((bounded.round().long() + levels // 2) * self.places.to(vectors.device)).sum(1)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """As ``Quantizer.decode``."""
        levels, places = self.levels.to(codes.device), self.places.to(codes.device)
        return (codes[:, None] // places % levels - levels // 2) / (levels // 2)
