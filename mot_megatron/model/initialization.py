"""Initialize weights from the seed and a parameter's global name, and from nothing else.

Each rank draws the whole tensor from a generator of its own and keeps its shard. Every layout
therefore starts from the same model, whatever order modules are built in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import nn

from mot_megatron.model.sharding import parts_of


def initialize_parameters(
    model: nn.Module, seed: int, std: float, tensor_rank: int, tensor_size: int
) -> None:
    """Fill every matrix with this rank's shard of normal(0, std), drawn in fp32.

    Vectors keep their values: norm weights start as ones, and biases as zeros.
    """
    for name, parameter in model.named_parameters():
        for part in parts_of(name, parameter):
            shape, shard_dim = part.sharding.global_shape, part.sharding.shard_dim
            if len(shape) == 1:
                continue
            whole = initial_values(part.name, shape, seed, std)
            if shard_dim is not None:
                whole = whole.chunk(tensor_size, shard_dim)[tensor_rank]
            with torch.no_grad():
                rows = parameter[part.rows]
                rows.copy_(whole.reshape(rows.shape))


def initial_values(name: str, shape: Sequence[int], seed: int, std: float) -> torch.Tensor:
    """Draw the whole matrix with global name ``name``, in fp32 on the host."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.empty(tuple(shape)).normal_(0.0, std, generator=generator)
