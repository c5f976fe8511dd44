"""A net of which ranks hold parts: layers by pipeline stage, towers by placement.

No token has to be sent between ranks: each is computed where its tower is, by the rank that the
placement gives it to, and every pipeline stage has inputs and a loss of its own. So the gradients
of each parameter are those of the whole net on one process, once its owners' are summed. Between
two layers the towers meet in a collective over the modality group, as they do in attention, forward
and backward: a reduction of gradients that came before it on one rank, after it on another, would
hang.
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
    stages: int = 1
    """Pipeline stages."""

    def stage(self, layer: int) -> int:
        """The stage of a layer."""
        return layer * self.stages // NUM_LAYERS


class Meet(torch.autograd.Function):
    """Hands tensors on after the ranks of a group have met, forward and backward."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, *streams: torch.Tensor) -> Any:
        """Wait for the others."""
        ctx.group = group
        dist.all_reduce(torch.zeros(1), group=group)
        return tuple(stream.clone() for stream in streams)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """Wait for the others."""
        dist.all_reduce(torch.zeros(1), group=ctx.group)
        return (None, *gradients)


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
        self.meeting: dist.ProcessGroup | None = None
        """The modality group."""
        self.stages = range(whole.stages)
        """Those that forward runs, if it has their layers."""

    def forward(self, batch: toy.Batch) -> toy.Losses:
        """[b, s] tokens to the summed loss of the tokens that this rank takes."""
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
            outputs = Meet.apply(self.meeting, *outputs)
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
