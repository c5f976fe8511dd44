"""A small net with everything that is difficult under ZeRO and tensor parallelism.

It has two towers (residual feed-forward networks, each for the tokens of half the vocabulary), odd
sizes, norm weights, biases, split and replicated parameters, and an embedding that is also used as
the output head, outside its own module.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mot_megatron.model.sharding import SHARED
from mot_megatron.optim.settings import OptimizerSettings

VOCABULARY, WIDTH = 13, 10
HIDDEN = (22, 6)
"""Inner widths of the towers' feed-forward networks; even, so that two ranks can split them."""
SEQUENCES, LENGTH = 8, 7
"""Sequences per optimizer step over all ranks and micro-batches, and tokens per sequence."""
NUM_TOWERS = len(HIDDEN)


class Losses(NamedTuple):
    """The return value of the net, a tuple because DeepSpeed finds tensors in tuples."""

    total: torch.Tensor
    """Sum of the token losses, times the batch's loss factor."""


def initial_weights() -> dict[str, torch.Tensor]:
    """Return the weights of the whole net, by name."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(*shape, generator=generator)

    weights = {"embedding.weight": normal(VOCABULARY, WIDTH), "norm": 1.0 + normal(WIDTH)}
    for tower, hidden in enumerate(HIDDEN):
        weights |= {
            f"towers.{tower}.scale": 1.0 + normal(1),
            f"towers.{tower}.up.weight": normal(hidden, WIDTH),
            f"towers.{tower}.up.bias": normal(hidden),
            f"towers.{tower}.down.weight": normal(WIDTH, hidden),
            f"towers.{tower}.down.bias": normal(WIDTH),
        }
    return weights


def shard(name: str, full: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """Return a tensor-parallel rank's part of a weight, or of a tensor of the same shape."""
    if ".up." in name:
        return full.chunk(size, 0)[rank]
    if name.endswith("down.weight"):
        return full.chunk(size, 1)[rank]
    return full


def tower_of_name(name: str) -> int:
    """Return the tower of the parameter ``name``."""
    return int(name.split(".")[1]) if name.startswith("towers.") else SHARED


class ReferenceTower(nn.Module):
    """An unsharded feed-forward network in plain torch."""

    def __init__(self, hidden: int):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(1))
        self.up = nn.Linear(WIDTH, hidden)
        self.down = nn.Linear(hidden, WIDTH)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.scale * self.down(torch.tanh(self.up(inputs)))


class ParallelTower(nn.Module):
    """The same network, built from megatron's layers."""

    def __init__(self, hidden: int, tensor_size: int):
        super().__init__()
        config = ModelParallelConfig(
            tensor_model_parallel_size=tensor_size, use_cpu_initialization=True
        )
        shared: dict[str, Any] = {
            "config": config,
            "init_method": nn.init.zeros_,
            "bias": True,
            "skip_bias_add": False,
        }
        self.scale = nn.Parameter(torch.zeros(1))
        self.up = ColumnParallelLinear(WIDTH, hidden, gather_output=False, **shared)
        self.down = RowParallelLinear(hidden, WIDTH, input_is_parallel=True, **shared)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden, _ = self.up(inputs)
        outputs, _ = self.down(torch.tanh(hidden))
        return self.scale * outputs


class Net(nn.Module):
    """A next-token predictor in which each tower processes its half of the vocabulary.

    Unless ``reentrant`` is None, towers are recomputed in backward, and it is the argument
    ``use_reentrant`` of ``torch.utils.checkpoint``.
    """

    def __init__(self, towers: list[nn.Module], reentrant: bool | None = None):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.norm = nn.Parameter(torch.zeros(WIDTH))
        self.towers = nn.ModuleList(towers)
        self.reentrant = reentrant

    def forward(self, batch: Batch) -> Losses:
        """Return the summed loss for [b, s] tokens. A tower without tokens runs on zero rows."""
        inputs, labels = batch.tokens[:, :-1].flatten(), batch.tokens[:, 1:].flatten()
        embedded = self.embedding(inputs)
        hidden = F.rms_norm(embedded, (WIDTH,), self.norm, eps=1e-5)
        tower_of_token = inputs * NUM_TOWERS // VOCABULARY
        for index, tower in enumerate(self.towers):
            rows = (tower_of_token == index).nonzero().flatten()
            part = self._run(tower, hidden[rows])
            embedded = embedded.index_add(0, rows, part.to(embedded.dtype))
        logits = F.linear(embedded, self.embedding.weight).float()
        return Losses(batch.factor * F.cross_entropy(logits, labels, reduction="sum"))

    def _run(self, tower: nn.Module, rows: torch.Tensor) -> torch.Tensor:
        if self.reentrant is None:
            return tower(rows)
        return checkpoint(tower, rows, use_reentrant=self.reentrant)


@dataclass
class Batch:
    """Tokens, and the factor on the summed loss."""

    tokens: torch.Tensor
    factor: float


def build(
    weights: dict[str, torch.Tensor], groups: Any = None, reentrant: bool | None = None
) -> Net:
    """Build the reference net (without ``groups``) or this rank's shard of the net."""
    if groups is None:
        groups = SimpleNamespace(tensor_rank=0, tensor_size=1)
        towers: list[nn.Module] = [ReferenceTower(hidden) for hidden in HIDDEN]
    else:
        towers = [ParallelTower(hidden, groups.tensor_size) for hidden in HIDDEN]
    net = Net(towers, reentrant)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            full = weights[name]
            parameter.copy_(shard(name, full, groups.tensor_rank, groups.tensor_size))
            parameter.tower = tower_of_name(name)  # type: ignore[attr-defined]
    return net


def step_tokens(step: int) -> torch.Tensor:
    """Return the [SEQUENCES, LENGTH] tokens of a step; the first half has none of tower 1."""
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH), generator=generator)
    first_of_tower_1 = -(-VOCABULARY // NUM_TOWERS)
    tokens[: SEQUENCES // 2] %= first_of_tower_1
    return tokens


def micro_batches(step: int, count: int, data_rank: int, data_size: int) -> list[Batch]:
    """Return this rank's micro-batches; with two ranks, those of the first have no tower 1."""
    factor = 1.0 / (SEQUENCES * (LENGTH - 1))
    mine = step_tokens(step).chunk(data_size)[data_rank]
    return [Batch(tokens, factor) for tokens in mine.chunk(count)]


def settings(**changes: Any) -> OptimizerSettings:
    """Return default settings with the given changes."""
    values: dict[str, Any] = {
        "betas": (0.9, 0.95),
        "eps": 1e-8,
        "weight_decay": 0.1,
        "clip_grad": 0.3,
        "zero_stage": 1,
        "offload": "none",
        "precision": "fp32",
        "gradient_accumulation_steps": 1,
        "micro_batch_size": 1,
    }
    return OptimizerSettings(**(values | changes))
