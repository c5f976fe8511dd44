"""A net that is split over ranks: layers by pipeline stage, towers by placement.

Ranks exchange no tokens. Every token is processed by the rank that the placement assigns it to, and
every pipeline stage has its own inputs and loss. Summed over its owners, the gradient of a
parameter therefore equals that of the whole net on one process. Between two layers, the ranks of a
modality group run a collective in forward and backward, as in attention. It would deadlock if a
gradient were reduced before it on one rank and after it on another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from mot_megatron.model.sharding import SHARED, mark_replica
from mot_megatron.parallel.groups import ProcessGroups
from mot_megatron.parallel.placement import Placement
from tests.optim import toy

VOCABULARY, WIDTH = toy.VOCABULARY, toy.WIDTH
HIDDEN = (22, 6, 10)
"""Inner widths of the feed-forward networks of towers 0, 1 and 2."""
NUM_LAYERS = 2
SEQUENCES, LENGTH = 8, 7
EMBEDDING = "embedding.lookup.weight"
ABSENT_STEP = 1
"""Step in which no token of the last tower occurs, so that its gradient is zero on all ranks."""


@dataclass(frozen=True)
class Whole:
    """The whole net, over all ranks."""

    num_towers: int
    tied: bool = True
    """Whether all layers use one embedding; otherwise they share nothing."""
    stages: int = 1
    """Number of pipeline stages."""

    def stage(self, layer: int) -> int:
        """Return the pipeline stage of a layer."""
        return layer * self.stages // NUM_LAYERS


class Barrier(torch.autograd.Function):
    """The identity, with a collective over a group in forward and in backward."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, *streams: torch.Tensor) -> Any:
        ctx.group = group
        dist.all_reduce(torch.zeros(1), group=group)
        return tuple(stream.clone() for stream in streams)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        dist.all_reduce(torch.zeros(1), group=ctx.group)
        return (None, *gradients)


class Layer(nn.Module):
    """A layer of towers, with an optional norm that all towers share."""

    def __init__(self, towers: dict[str, nn.Module], shared_norm: bool):
        super().__init__()
        self.norm = nn.Parameter(torch.zeros(WIDTH)) if shared_norm else None
        self.towers = nn.ModuleDict(towers)


class Embedding(nn.Module):
    """A wrapper that gives the weight the same name as in the model."""

    def __init__(self) -> None:
        super().__init__()
        self.lookup = nn.Embedding(VOCABULARY, WIDTH)


class Net(nn.Module):
    """Some layers and towers of the whole net."""

    features: torch.Tensor

    def __init__(self, whole: Whole, layers: dict[str, Layer]):
        super().__init__()
        self.whole = whole
        self.embedding = Embedding() if whole.tied else None
        self.layers = nn.ModuleDict(layers)
        generator = torch.Generator().manual_seed(5)
        self.register_buffer("features", torch.randn(VOCABULARY, WIDTH, generator=generator))
        self.taker: tuple[Placement, int] | None = None
        """Placement and modality rank whose tokens forward processes; None: all tokens."""
        self.meeting: dist.ProcessGroup | None = None
        """Modality group."""
        self.stages = range(whole.stages)
        """Stages that forward runs, as far as this net has their layers."""

    def forward(self, batch: toy.Batch) -> toy.Losses:
        """Return the summed loss over the tokens of this rank, given [b, s] tokens."""
        inputs, labels = batch.tokens[:, :-1].flatten(), batch.tokens[:, 1:].flatten()
        table = self.features.to(next(self.parameters()).dtype)  # DeepSpeed leaves buffers in fp32
        if self.embedding is not None:
            table = self.embedding.lookup.weight
        losses = [torch.zeros(())]
        for stage in self.stages:
            streams: list[tuple[str, torch.Tensor, torch.Tensor]] = []  # tower, labels, hidden
            for layer in self._layers_of(stage):
                if not streams:
                    taken = {name: self._taken(int(name), inputs) for name in layer.towers}
                    streams = [
                        (n, labels[r], F.embedding(inputs[r], table)) for n, r in taken.items()
                    ]
                streams = self._run(layer, streams)
            for _, wanted, hidden in streams:
                logits = F.linear(hidden, table).float()
                losses.append(F.cross_entropy(logits, wanted, reduction="sum"))
        return toy.Losses(batch.factor * torch.stack(losses).sum())

    def _layers_of(self, stage: int) -> list[Layer]:
        return [
            layer
            for name, layer in self.layers.items()
            if isinstance(layer, Layer) and self.whole.stage(int(name)) == stage
        ]

    def _run(
        self, layer: Layer, streams: list[tuple[str, torch.Tensor, torch.Tensor]]
    ) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
        outputs = []
        for name, _, hidden in streams:
            normed = hidden
            if layer.norm is not None:
                normed = F.rms_norm(hidden, (WIDTH,), layer.norm, eps=1e-5)
            outputs.append(hidden + layer.towers[name](normed))
        if self.meeting is not None:
            outputs = Barrier.apply(self.meeting, *outputs)
        return [
            (name, wanted, output)
            for (name, wanted, _), output in zip(streams, outputs, strict=True)
        ]

    def _taken(self, tower: int, inputs: torch.Tensor) -> torch.Tensor:
        rows = (inputs % self.whole.num_towers == tower).nonzero().flatten()
        if self.taker is None:
            return rows
        placement, rank = self.taker
        cuts = placement.cuts(tower, len(rows))
        return rows[cuts[rank] : cuts[rank + 1]]


def initial_weights(whole: Whole) -> dict[str, torch.Tensor]:
    """Return the weights of the whole net, by name."""
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
    """Return the tower of the parameter ``name``."""
    return int(name.split(".")[3]) if ".towers." in name else SHARED


def build_whole(whole: Whole, parallel_layers: bool) -> Net:
    """Build the whole net from layers of torch, or of megatron, which round differently."""

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
    """Build this rank's part of the net, with its initial weights."""
    held = groups.towers_held(whole.num_towers)
    stage = groups.pipeline_rank
    layers = {
        str(index): Layer(
            {str(t): toy.ParallelTower(HIDDEN[t], groups.tensor_size) for t in held}, whole.tied
        )
        for index in range(NUM_LAYERS)
        if whole.stage(index) == stage
    }
    net = Net(whole, layers)
    if groups.placement is not None:
        net.taker, net.meeting = (groups.placement, groups.modality_rank), groups.modality
    _fill(net, groups.tensor_rank, groups.tensor_size)
    if net.embedding is not None and whole.stages > 1:
        net.embedding.lookup.weight.tied_across_stages = True  # type: ignore[attr-defined]
        if stage == whole.stages - 1:
            mark_replica(net.embedding)
    return net


def _fill(net: Net, tensor_rank: int, tensor_size: int) -> None:
    weights = initial_weights(net.whole)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(toy.shard(name, weights[name], tensor_rank, tensor_size))
            parameter.tower = tower_of_name(name)  # type: ignore[attr-defined]


def step_tokens(step: int, num_towers: int) -> torch.Tensor:
    """Return the [SEQUENCES, LENGTH] tokens of a step; the first half has none of tower 1."""
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH), generator=generator)
    half = tokens[: SEQUENCES // 2]
    half[half % num_towers == 1] -= 1
    if step == ABSENT_STEP:
        tokens[tokens % num_towers == num_towers - 1] -= 1
    return tokens


def micro_batches(step: int, num_towers: int, count: int, part: int, parts: int) -> list[Any]:
    """Return the micro-batches of the modality group with index ``part`` out of ``parts``."""
    factor = 1.0 / (SEQUENCES * (LENGTH - 1))
    mine = step_tokens(step, num_towers).chunk(parts)[part]
    return [toy.Batch(tokens, factor) for tokens in mine.chunk(count)]
