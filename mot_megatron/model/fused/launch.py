"""What all kernels share: checks of their inputs and sizes of their launches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

DTYPES = (torch.float32, torch.bfloat16)
"""Allowed dtypes of the tensors; kernels compute in fp32, so wider ones would lose digits."""
MOST_PARTIAL_SUMS = 512
"""Most programs that sum a weight's gradient, each over its own rows; one more sum adds theirs.

It is a constant, so that the order of the sums depends only on the number of rows.
"""


def check_dtype(x: torch.Tensor) -> None:
    """Check that the kernels support the dtype of ``x``.

    Raises:
        TypeError: They do not.
    """
    if x.dtype not in DTYPES:
        names = " or ".join(map(str, DTYPES))
        raise TypeError(f"a tensor of {x.dtype} in a Triton kernel of the layer; allowed: {names}")


def with_contiguous_rows(x: torch.Tensor) -> torch.Tensor:
    """Return ``x``, copied only if the elements of its last dimension are not adjacent."""
    return x if x.stride(-1) == 1 else x.contiguous()


@dataclass(frozen=True)
class Tiling:
    """The division of [n, size] into tiles [ROWS, BLOCK], whose sides are powers of two."""

    grid: tuple[int, int]
    """Tiles in each dimension."""
    meta: dict[str, int]
    """ROWS, BLOCK and the number of warps: keywords of a launch."""

    @classmethod
    def of(cls, rows: int, size: int, elements: int, whole_rows: bool = False) -> Tiling:
        """Divide into tiles of at most ``elements``, or of at least one row if ``whole_rows``."""
        block = triton.next_power_of_2(size)
        if not whole_rows:
            block = min(block, elements)
        tile_rows = max(elements // block, 1)
        grid = triton.cdiv(rows, tile_rows), triton.cdiv(size, block)
        meta = {"ROWS": tile_rows, "BLOCK": block, "num_warps": warps_for(tile_rows * block)}
        return cls(grid, meta)


def warps_for(elements: int) -> int:
    """Return the number of warps of a program that holds ``elements`` per tensor in registers."""
    return 4 if elements <= 2048 else 8 if elements <= 8192 else 16


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run ``kernel`` on the device of its first argument, or not at all if the grid is empty."""
    if min(grid) > 0:
        with torch.cuda.device_of(arguments[0]):
            kernel[grid](*arguments, **constants)


@triton.jit
def place(ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Return the rows [ROWS, 1] (int64) and columns [1, BLOCK] of this program's tile."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    return row, column
