"""What all kernels share: checks of their inputs and sizes of their launches."""

from __future__ import annotations

import torch

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


def warps_for(elements: int) -> int:
    """Return the number of warps of a program that holds ``elements`` per tensor in registers."""
    return 4 if elements <= 2048 else 8 if elements <= 8192 else 16
