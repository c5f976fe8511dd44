"""Time forward and backward of one layer: ours, and other implementations of untied weights.

Every variant has the same active FLOPs, apart from the routers of mixtures of experts, and the same
attention, over one causal document. Implementations of one number of towers share their weights.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from mot_megatron.config import Config
from mot_megatron.config_files import parse_config
from mot_megatron.config_model import ModelConfig
from mot_megatron.data.batches import build_micro_batch
from mot_megatron.data.modality_shards import ModalityShard
from mot_megatron.job.hardware import synchronize
from mot_megatron.model.attention_core import build_attention_core
from mot_megatron.model.exchange import HeadSlices, ModalityExchange
from mot_megatron.model.grouping import Grouping
from mot_megatron.model.initialization import initialize_parameters
from mot_megatron.model.layer import Layer, LayerInputs
from mot_megatron.model.micro_batch import MicroBatch
from mot_megatron.model.norm import RMSNorm
from mot_megatron.model.operations import PLAIN, LayerOperations, layer_operations
from mot_megatron.model.rotary import RotaryAngles
from mot_megatron.model.routing import RoutingMode, routing_pools
from mot_megatron.model.towers import ParallelLinears, PerTower
from mot_megatron.parallel.groups import ProcessGroups
from mot_megatron.parallel.placement import balanced_placement

NUM_TOWERS = (2, 3)
NUM_EXPERTS = 4
MIXTURES = {
    f"expert-choice-{NUM_EXPERTS}": 'routing = "expert_choice"',
    f"expert-choice-{NUM_EXPERTS}-causal": 'routing = "expert_choice"\ncausal_router = true',
    f"top-1-of-{NUM_EXPERTS}": 'routing = "topk"',
}
"""Mixtures of experts in a single tower, with one expert per token, on average or exactly."""
FUSED_ALONE = ("swiglu", "norm_then_add", "rotated_heads", "to_towers")
"""Operations of a post-norm layer that are also timed one at a time."""
LONGEST_RUN = 256
"""Maximum number of consecutive tokens of one modality."""
PROFILED_OPERATIONS = 15

CONFIG = """
[run]
name = "benchmark"
[data]
corpus = "none"
[model]
num_layers = 1
hidden_size = {hidden}
num_attention_heads = {heads}
vocab_size = 128
[training]
train_steps = 1
global_batch_size = 1
[model.modalities]
"""


class MaskedRows:
    """Selects the rows of each tower by boolean masks, as the published code does."""

    def __init__(self, towers: torch.Tensor, num_towers: int) -> None:
        self.selectors = [towers == tower for tower in range(num_towers)]

    def pick(self, x: torch.Tensor) -> list[torch.Tensor]:
        """[t, c] -> K x [t_k, c]."""
        return [x[mask] for mask in self.selectors]

    def merge(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """K x [t_k, ...] -> [t, ...]."""
        merged = parts[0].new_empty(len(self.selectors[0]), *parts[0].shape[1:])
        for mask, part in zip(self.selectors, parts, strict=True):
            merged[mask] = part
        return merged


class IndexedRows:
    """Selects the rows of each tower by integer positions."""

    def __init__(self, towers: torch.Tensor, num_towers: int) -> None:
        self.num_tokens = len(towers)
        self.selectors = [torch.nonzero(towers == tower).flatten() for tower in range(num_towers)]

    def pick(self, x: torch.Tensor) -> list[torch.Tensor]:
        """[t, c] -> K x [t_k, c]."""
        return [x.index_select(0, index) for index in self.selectors]

    def merge(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """K x [t_k, ...] -> [t, ...]."""
        merged = parts[0].new_empty(self.num_tokens, *parts[0].shape[1:])
        for index, part in zip(self.selectors, parts, strict=True):
            merged = merged.index_put((index,), part)
        return merged


def run_in_sequence_order(
    layer: Layer, x: torch.Tensor, layer_inputs: LayerInputs, rows: MaskedRows | IndexedRows
) -> torch.Tensor:
    """Run our post-norm layer with the stream [t, h] in sequence order instead of grouped order.

    The rows of each tower are picked before, and merged after, every operation with untied weights.
    """
    attention = layer.attention
    split = [attention.heads.split(part) for part in attention.qkv(rows.pick(x))]
    queries, keys, values = zip(*split, strict=True)
    q = layer_inputs.rotary.rotate(rows.merge(attention.q_norm(queries)).flatten(1, 2))
    k = layer_inputs.rotary.rotate(rows.merge(attention.k_norm(keys)).flatten(1, 2))
    v = rows.merge(values).flatten(1, 2)
    mixed = layer_inputs.attend(0, q, k, v).flatten(1)
    updates = attention.output_projection(rows.pick(mixed))
    x = x + rows.merge(_normalize(layer.attention_norm, updates))
    updates = layer.feed_forward(rows.pick(x), layer_inputs.pools)
    return x + rows.merge(_normalize(layer.feed_forward_norm, updates))


def _normalize(norms: PerTower, slices: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    normed = []
    for norm, part in zip(norms.modules_of_slices, slices, strict=True):
        assert isinstance(norm, RMSNorm)
        normed.append(norm.normalize(part))
    return normed


@dataclass(frozen=True)
class Variant:
    """A way to run a layer; ``forward`` maps the tensors of the input stream to the output's."""

    name: str
    layer: nn.Module
    inputs: tuple[torch.Tensor, ...]
    forward: Callable[[tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]]
    to_sequence: Callable[[tuple[torch.Tensor, ...]], torch.Tensor]
    """Brings outputs, or gradients of the inputs, into sequence order, [t, h].

    With modality parallelism, it concatenates this rank's rows in the order of the stream instead.
    """

    def step(self) -> tuple[torch.Tensor, ...]:
        """Run forward and backward with the loss ``sum(y * y) / 2``; return the outputs.

        Gradients accumulate in inputs and weights.
        """
        outputs = self.forward(self.inputs)
        torch.autograd.backward(outputs, [output.detach() for output in outputs])
        return outputs

    def clear(self) -> None:
        """Drop all gradients."""
        self.layer.zero_grad(set_to_none=True)
        for tensor in self.inputs:
            tensor.grad = None


class _UnsentExchange(ModalityExchange):
    """An exchange that packs and unpacks rows but sends none; received rows are uninitialized."""

    def send(self, buffer: torch.Tensor) -> torch.Tensor:
        return buffer.new_empty(sum(self.plan.receive_rows), *buffer.shape[1:])

    def send_back(self, buffer: torch.Tensor) -> torch.Tensor:
        return buffer.new_empty(sum(self.send_sizes), *buffer.shape[1:])


@dataclass(frozen=True)
class Benchmark:
    """Builds variants of a layer, all with the same sizes, device and process groups."""

    tokens: int
    hidden: int
    heads: int
    device: torch.device
    dtype: torch.dtype
    groups: ProcessGroups

    def variants(self) -> list[Variant]:
        """Return dense, then the three implementations for every number of towers."""
        variants = [self.ours(1, "dense")]
        for num_towers in NUM_TOWERS:
            ours, layer_inputs, towers = self._ours(num_towers, f"mot-{num_towers}")
            kinds = {"mask": MaskedRows, "gather-scatter": IndexedRows}
            others = [
                self._in_sequence_order(
                    f"{name}-{num_towers}", ours, layer_inputs, kind(towers, num_towers)
                )
                for name, kind in kinds.items()
            ]
            variants += [ours, *others]
        return variants

    def mixtures(self) -> list[Variant]:
        """Return dense layers with a mixture of experts as their feed-forward network."""
        return [
            self._ours(1, name, f"num_moe_experts = {NUM_EXPERTS}\n{routing}\n")[0]
            for name, routing in MIXTURES.items()
        ]

    def compiled(self) -> list[Variant]:
        """Return dense and ours compiled by torch.compile, specialized to the batch's sizes."""
        variants = [self.ours(1, "dense")] + [self.ours(k, f"mot-{k}") for k in NUM_TOWERS]
        return [
            replace(v, name=f"{v.name} compiled", forward=torch.compile(v.forward, dynamic=False))
            for v in variants
        ]

    def fused(self, backend: Literal["triton", "compile"]) -> list[Variant]:
        """Return dense and ours with fused operations, and with each of these alone.

        Raises:
            ConfigError: Triton does not run on the device.
        """
        operations = layer_operations(backend, self.device.type == "cuda")
        most = NUM_TOWERS[-1]
        names = {1: "dense"} | {towers: f"mot-{towers}" for towers in NUM_TOWERS}
        variants = [
            self._ours(towers, f"{name} {backend}", operations=operations)[0]
            for towers, name in names.items()
        ]
        for field in FUSED_ALONE:
            alone = replace(PLAIN, **{field: getattr(operations, field)})
            name = f"{names[most]} {backend} {field}"
            variants.append(self._ours(most, name, operations=alone)[0])
        return variants

    def exchange_permutations(self, exchange: Literal["sequence", "heads"]) -> Variant:
        """Return only the exchange's work on rows, on one of a pair of ranks, without sending."""
        placement = balanced_placement([1.0, 1.0], 2)
        batch = self._batch(2, ModalityShard(placement, 0, exchange))[1].to(self.device)
        local = _UnsentExchange.of(
            HeadSlices.of(exchange, self.heads, self.heads, 2),
            placement.towers(0),
            batch,
            self.groups.tensor,
        )
        rows = batch.tower_slots[0]
        shape = (rows, self.heads, self.hidden // self.heads)
        parts = [self._stream(rows).view(shape).requires_grad_() for _ in range(3)]

        def forward(parts: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            queries, keys, values = parts
            q, k, v = local.to_attention([queries], [keys], [values])
            return (*local.from_attention(q), k, v)

        return Variant(
            f"exchange-{exchange}", nn.Identity(), tuple(parts), forward, to_sequence=torch.cat
        )

    def ours(self, num_towers: int, name: str) -> Variant:
        """Return our layer with all towers on this rank; with one tower, it is the dense layer."""
        return self._ours(num_towers, name)[0]

    def _ours(
        self,
        num_towers: int,
        name: str,
        experts: str | None = None,
        operations: LayerOperations = PLAIN,
    ) -> tuple[Variant, LayerInputs, torch.Tensor]:
        config = self._config(num_towers, experts)
        towers, batch = self._batch(num_towers)
        batch = batch.to(self.device)
        grouping = Grouping.of(batch)
        layer_inputs = self._layer_inputs(config.model, batch, grouping, range(num_towers))
        layer = self._layer(config, self.groups, operations)
        inputs = tuple(
            part.detach().requires_grad_() for part in grouping.to_towers(self._stream())
        )
        variant = Variant(
            name,
            layer,
            inputs,
            forward=lambda stream: layer(stream, layer_inputs),
            to_sequence=grouping.to_sequence,
        )
        return variant, layer_inputs, towers.to(self.device)

    def modality_parallel(
        self, num_towers: int, name: str, exchange: Literal["sequence", "heads"]
    ) -> Variant:
        """Return our layer with towers spread over a modality group, with one sequence per rank."""
        placement, group = self.groups.placement, self.groups.modality
        assert placement is not None
        assert group is not None
        config = self._config(num_towers)
        shard = ModalityShard(placement, self.groups.modality_rank, exchange)
        batch = self._batch(num_towers, shard)[1].to(self.device)
        held = self.groups.towers_held(num_towers)
        heads = HeadSlices.of(exchange, self.heads, self.heads, placement.num_ranks)
        exchange_of_group = ModalityExchange.of(heads, held, batch, group)
        layer_inputs = self._layer_inputs(config.model, batch, exchange_of_group, held)
        layer = self._layer(config, self.groups)
        rows = [batch.tower_slots[tower] for tower in held]
        stream = self._stream(sum(rows)).split(rows)
        return Variant(
            name,
            layer,
            tuple(part.detach().requires_grad_() for part in stream),
            forward=lambda stream: layer(stream, layer_inputs),
            to_sequence=torch.cat,
        )

    def _layer(
        self, config: Config, groups: ProcessGroups, operations: LayerOperations = PLAIN
    ) -> Layer:
        linears = ParallelLinears(groups, sequence_parallel=False, dtype=self.dtype)
        routing = RoutingMode((1 / self.tokens,) * config.model.num_towers)
        layer = Layer(config.model, linears, 0, False, routing, operations)
        initialize_parameters(layer, config.run.seed, config.model.init_std, 0, 1)
        return layer.to(device=self.device, dtype=self.dtype)

    def _layer_inputs(
        self,
        model: ModelConfig,
        batch: MicroBatch,
        grouping: Grouping | ModalityExchange,
        held: Sequence[int],
    ) -> LayerInputs:
        rotary = RotaryAngles.of(batch.positions, model.head_dim, model.rotary_base, self.dtype)
        slots = [batch.tower_slots[tower] for tower in held]
        filled, sequences = batch.filled.split(slots), batch.slot_sequences.split(slots)
        pools = routing_pools(held, filled, sequences, batch)
        return LayerInputs(grouping, rotary, build_attention_core(batch, "auto"), pools)

    def _in_sequence_order(
        self, name: str, ours: Variant, layer_inputs: LayerInputs, rows: MaskedRows | IndexedRows
    ) -> Variant:
        layer = ours.layer
        assert isinstance(layer, Layer)
        return Variant(
            name,
            layer,
            (self._stream().requires_grad_(),),
            forward=lambda stream: (run_in_sequence_order(layer, stream[0], layer_inputs, rows),),
            to_sequence=lambda stream: stream[0],
        )

    def _config(self, num_towers: int, experts: str | None = None) -> Config:
        """Return a configuration with one tower per modality.

        Args:
            num_towers: Number of modalities and towers.
            experts: Settings of a mixture of experts in the first tower, as TOML; None: no experts.
        """
        modalities = "".join(f'm{k} = {{ tower = "t{k}" }}\n' for k in range(num_towers))
        text = CONFIG.format(hidden=self.hidden, heads=self.heads) + modalities
        if experts is not None:
            text += f"[model.towers.t0.experts]\n{experts}"
        return parse_config(text, "benchmark_layer")

    def _stream(self, rows: int | None = None) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        rows = self.tokens if rows is None else rows
        stream = torch.randn(rows, self.hidden, generator=generator)
        return stream.to(device=self.device, dtype=self.dtype)

    def _batch(
        self, num_towers: int, shard: ModalityShard | None = None
    ) -> tuple[torch.Tensor, MicroBatch]:
        """Build a batch of one document, with random runs of tokens of each modality.

        With a shard, the batch has one such sequence per rank of the modality group, all equal.

        Returns:
            [t] tower of every token of a sequence, and the batch.
        """
        generator = np.random.default_rng(0)
        longest = max(1, min(LONGEST_RUN, self.tokens // (8 * num_towers)))
        runs = generator.integers(1, longest + 1, self.tokens)
        towers = np.repeat(np.arange(self.tokens) % num_towers, runs)[: self.tokens]
        sequences = 1 if shard is None else shard.placement.num_ranks
        batch = build_micro_batch(
            np.tile(towers, (sequences, 1)),
            np.zeros((sequences, self.tokens), dtype=np.int32),
            np.arange(num_towers, dtype=np.int8),
            range(num_towers),
            num_towers=num_towers,
            shard=shard,
        )
        return torch.from_numpy(towers), batch


def measure(
    variants: list[Variant], repeats: int, device: torch.device, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Return every variant's seconds in every round, without a warm-up round."""
    seconds: dict[str, list[float]] = {variant.name: [] for variant in variants}
    order = random.Random(0)
    with tqdm(total=(1 + repeats) * len(variants), ncols=100, delay=5) as bar:
        for number in range(1 + repeats):
            for variant in order.sample(variants, len(variants)):
                variant.clear()
                synchronize(device)
                began = clock()
                variant.step()
                synchronize(device)
                if number > 0:
                    seconds[variant.name].append(clock() - began)
                variant.clear()
                bar.set_postfix_str(variant.name, refresh=False)
                bar.update()
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median and the quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def profile_difference(dense: Variant, ours: Variant, device: torch.device) -> str:
    """Return a table of the operations that take the most additional time in ``ours``."""
    of_variants = [_operation_seconds(variant, device) for variant in (dense, ours)]
    names = set(of_variants[0]) | set(of_variants[1])
    rows = [(of_variants[1].get(n, 0.0) - of_variants[0].get(n, 0.0), n) for n in names]
    rows.sort(reverse=True)
    total = sum(of_variants[0].values())
    lines = [f"{ours.name} minus dense, self time of operations (dense: {total * 1e3:.1f} ms)"]
    lines += [
        f"{difference * 1e3:+9.2f} ms {difference / total:+7.2%}  {name}"
        for difference, name in rows[:PROFILED_OPERATIONS]
    ]
    lines.append(f"{sum(d for d, _ in rows) * 1e3:+9.2f} ms in total")
    return "\n".join(lines)


def _operation_seconds(variant: Variant, device: torch.device) -> dict[str, float]:
    """Return the median self time of every operation over a few steps."""
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]
    variant.step()
    samples: dict[str, list[float]] = {}
    steps = 5
    for _ in range(steps):
        variant.clear()
        with profile(activities=activities) as recorded:
            variant.step()
            synchronize(device)
        for event in recorded.key_averages():
            time_us = event.self_device_time_total if on_cuda else event.self_cpu_time_total
            samples.setdefault(event.key, []).append(time_us * 1e-6)
    variant.clear()
    return {
        name: statistics.median(values + [0.0] * (steps - len(values)))
        for name, values in samples.items()
    }
