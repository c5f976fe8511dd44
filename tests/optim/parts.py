"""A net of which ranks hold parts: layers by pipeline stage, towers by placement.

Nothing has to be sent between ranks: every token is computed where its tower is, by the rank that
the placement gives it to, and every layer has a loss of its own. So the gradients of each parameter
are those of the whole net on one process, once its owners' are summed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from mot_megatron.model.sharding import SHARED, mark_replica
from mot_megatron.parallel.groups import ProcessGroups
from mot_megatron.parallel.placement import Placement
from tests.optim import toy

VOCABULARY, WIDTH = toy.VOCABULARY, toy.WIDTH
HIDDEN = (22, 6, 10)
"""Of the feed-forwards of the towers 0, 1 and 2."""
NUM_LAYERS = 2
SEQUENCES, LENGTH = 8, 7
EMBEDDING = "embedding.lookup.weight"
ABSENT_STEP = 1
"""The step in which no token of the last tower occurs; its gradient is zero everywhere."""


@dataclass(frozen=True)
class Whole:
    """What all ranks together hold."""

    num_towers: int
    tied: bool = True
    """Whether an embedding is shared by the layers; without, the layers share nothing."""


class Layer(nn.Module):
    """Towers and a norm, which belongs to no tower."""

    def __init__(self, towers: dict[str, nn.Module], shared_norm: bool):
        super().__init__()
        self.norm = nn.Parameter(torch.zeros(WIDTH)) if shared_norm else None
        self.towers = nn.ModuleDict(towers)


class Embedding(nn.Module):
    """Only so that the weight's name is the model's."""

    def __init__(self) -> None:
        super().__init__()
        self.lookup = nn.Embedding(VOCABULARY, WIDTH)


class Net(nn.Module):
    """Some layers and some towers of the whole net."""

    features: torch.Tensor

    def __init__(self, whole: Whole, layers: dict[str, Layer]):
        super().__init__()
        self.whole = whole
        self.embedding = Embedding() if whole.tied else None
        self.layers = nn.ModuleDict(layers)
        generator = torch.Generator().manual_seed(5)
        self.register_buffer("features", torch.randn(VOCABULARY, WIDTH, generator=generator))
        self.taker: tuple[Placement, int] | None = None
        """Which rank's tokens forward takes; None for all."""

    def forward(self, batch: toy.Batch) -> toy.Losses:
        """[b, s] tokens to the summed loss of the tokens that this rank takes."""
        inputs, labels = batch.tokens[:, :-1].flatten(), batch.tokens[:, 1:].flatten()
        table = self.features if self.embedding is None else self.embedding.lookup.weight
        losses = []
        for layer in self.layers.values():
            assert isinstance(layer, Layer)
            for name, tower in layer.towers.items():
                rows = (inputs % self.whole.num_towers == int(name)).nonzero().flatten()
                rows = self._taken(int(name), rows)
                hidden = F.embedding(inputs[rows], table)
                normed = hidden
                if layer.norm is not None:
                    normed = F.rms_norm(hidden, (WIDTH,), layer.norm, eps=1e-5)
                logits = F.linear(hidden + tower(normed), table).float()
                losses.append(F.cross_entropy(logits, labels[rows], reduction="sum"))
        return toy.Losses(batch.factor * torch.stack(losses).sum())

    def _taken(self, tower: int, rows: torch.Tensor) -> torch.Tensor:
        if self.taker is None:
            return rows
        placement, rank = self.taker
        cuts = placement.cuts(tower, len(rows))
        return rows[cuts[rank] : cuts[rank + 1]]


def initial_weights(whole: Whole) -> dict[str, torch.Tensor]:
    """The whole net's weights by name."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(*shape, generator=generator)

    weights = {EMBEDDING: normal(VOCABULARY, WIDTH)} if whole.tied else {}
    for layer in range(NUM_LAYERS):
        if whole.tied:
            weights[f"layers.{layer}.norm"] = 1.0 + normal(WIDTH)
        for tower, hidden in enumerate(HIDDEN[: whole.num_towers]):
            prefix = f"layers.{layer}.towers.{tower}"
            weights |= {
                f"{prefix}.scale": 1.0 + normal(1),
                f"{prefix}.up.weight": normal(hidden, WIDTH),
                f"{prefix}.up.bias": normal(hidden),
                f"{prefix}.down.weight": normal(WIDTH, hidden),
                f"{prefix}.down.bias": normal(WIDTH),
            }
    return weights


def tower_of_name(name: str) -> int:
    """The tower that owns the parameter ``name``."""
    return int(name.split(".")[3]) if ".towers." in name else SHARED


def build_whole(whole: Whole, parallel_layers: bool) -> Net:
    """The net on one process, over torch's layers, or over megatron's, which round otherwise."""

    def tower(hidden: int) -> nn.Module:
        return toy.ParallelTower(hidden, 1) if parallel_layers else toy.ReferenceTower(hidden)

    layers = {
        str(index): Layer(
            {str(t): tower(hidden) for t, hidden in enumerate(HIDDEN[: whole.num_towers])},
            whole.tied,
        )
        for index in range(NUM_LAYERS)
    }
    net = Net(whole, layers)
    _fill(net, 0, 1)
    return net


def build_part(whole: Whole, groups: ProcessGroups) -> Net:
    """This rank's part, with its initial weights."""
    held = groups.towers_held(whole.num_towers)
    stage, stages = groups.pipeline_rank, groups.pipeline_size
    layers = {
        str(index): Layer(
            {str(t): toy.ParallelTower(HIDDEN[t], groups.tensor_size) for t in held}, whole.tied
        )
        for index in range(NUM_LAYERS)
        if index * stages // NUM_LAYERS == stage
    }
    net = Net(whole, layers)
    if groups.placement is not None:
        net.taker = groups.placement, groups.modality_rank
    _fill(net, groups.tensor_rank, groups.tensor_size)
    if net.embedding is not None and stages > 1:
        net.embedding.lookup.weight.tied_across_stages = True  # type: ignore[attr-defined]
        if stage == stages - 1:
            mark_replica(net.embedding)
    return net


def _fill(net: Net, tensor_rank: int, tensor_size: int) -> None:
    weights = initial_weights(net.whole)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(toy.shard(name, weights[name], tensor_rank, tensor_size))
            parameter.tower = tower_of_name(name)  # type: ignore[attr-defined]


def step_tokens(step: int, num_towers: int) -> torch.Tensor:
    """[SEQUENCES, LENGTH] of one optimizer step; the first half has no token of tower 1."""
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH), generator=generator)
    half = tokens[: SEQUENCES // 2]
    half[half % num_towers == 1] -= 1
    if step == ABSENT_STEP:
        tokens[tokens % num_towers == num_towers - 1] -= 1
    return tokens


def micro_batches(step: int, num_towers: int, count: int, part: int, parts: int) -> list[Any]:
    """Micro-batches of one modality group out of ``parts``."""
    factor = 1.0 / (SEQUENCES * (LENGTH - 1))
    mine = step_tokens(step, num_towers).chunk(parts)[part]
    return [toy.Batch(tokens, factor) for tokens in mine.chunk(count)]
