"""Tensors of a source and of an output, described without their values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a whole tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size of the values in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorSource(Protocol):
    """Tensors by name, read one at a time."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Shape and dtype of every tensor, by name."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """Read a whole tensor anew; only this tensor is then in memory.

        Raises:
            UserError: A file is damaged or cannot be read.
        """
        ...


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of the output, produced when it is written."""

    name: str
    """Name in the output."""
    info: TensorInfo
    sources: tuple[str, ...]
    """Names of the source's tensors that it is made of."""
    produce: Callable[[], torch.Tensor]
    """Returns the contiguous values on the CPU, of the shape and dtype in ``info``."""


def size_text(num_bytes: float) -> str:
    """Return a number of bytes with a decimal unit, such as 1.51 GB."""
    unit = ""
    for larger in ("k", "M", "G", "T"):
        if num_bytes < 1000:
            break
        num_bytes, unit = num_bytes / 1000, larger
    return f"{num_bytes:.3g} {unit}B"
