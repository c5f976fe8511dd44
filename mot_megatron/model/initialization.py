"""Initialize weights from the seed and a parameter's global name, and from nothing else.

Each rank draws the whole tensor from a generator of its own and keeps its shard. Every layout
therefore starts from the same model, whatever order modules are built in, and threads may draw
several tensors at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from mot_megatron.model.sharding import NamedPart, parts_of


def mark_zero(parameter: nn.Parameter) -> None:
    """Mark a matrix that starts as zeros."""
    parameter.starts_as_zeros = True  # type: ignore[attr-defined]


DRAWN_AT_ONCE = 8
"""Tensors that a rank draws at a time at most: one per thread that torch has."""


def initialize_parameters(
    model: nn.Module, seed: int, std: float, tensor_rank: int, tensor_size: int
) -> None:
    """Fill every matrix with this rank's shard of normal(0, std), drawn in fp32.

    Vectors and marked matrices keep their values: norm weights start as ones, and biases as zeros.
    Parameters on the
    meta device stay without values.
    """

    def fill(parameter: nn.Parameter, part: NamedPart) -> None:
        shape, shard_dim = part.sharding.global_shape, part.sharding.shard_dim
        whole = initial_values(part.name, shape, seed, std)
        if shard_dim is not None:
            whole = whole.chunk(tensor_size, shard_dim)[tensor_rank]
        with torch.no_grad():
            rows = parameter[part.rows]
            rows.copy_(whole.reshape(rows.shape))

    matrices = [
        (parameter, part)
        for name, parameter in model.named_parameters()
        for part in parts_of(name, parameter)
        if len(part.sharding.global_shape) > 1
        and not parameter.is_meta
        and not hasattr(parameter, "starts_as_zeros")
    ]
    # Drawing takes 6 to 13 ns per number and does not hold Python's lock.
    with ThreadPoolExecutor(min(DRAWN_AT_ONCE, torch.get_num_threads()), "initial values") as pool:
        for done in [pool.submit(fill, *matrix) for matrix in matrices]:
            done.result()


def initial_values(name: str, shape: Sequence[int], seed: int, std: float) -> torch.Tensor:
    """Draw the whole matrix with global name ``name``, in fp32 on the host."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.empty(tuple(shape)).normal_(0.0, std, generator=generator)
