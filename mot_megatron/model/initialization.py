"""Initial weights that depend on the seed and a parameter's global name, and on nothing else.

Each rank draws the whole tensor from a generator of its own and keeps its part, so every layout
starts from the same model, whatever the order in which modules are built.
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
    """Fill every matrix with normal(0, std) in fp32, cut to this rank; leave vectors as they are.

    Norm weights, the only vectors, are made as ones.
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
    """The whole matrix of that global name, fp32 on the host."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.empty(tuple(shape)).normal_(0.0, std, generator=generator)
