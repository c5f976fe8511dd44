"""Estimate of a step's time in any layout, from few rehearsals instead of one per layout.

The work of a layer and of the rest of the model is counted in rehearsals of one and of two layers
on one rank. A layout divides it among its ranks; what they send follows from the sizes of weights
and rows. The result goes through the same cost model as a forecast, and is within a tenth of it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from mot_megatron.config import Config
from mot_megatron.model.pieces import pieces_of_stage
from mot_megatron.optim.settings import LARGEST_BUCKET
from mot_megatron.parallel.buckets import REDUCED_TOGETHER
from mot_megatron.planning.layouts import RECOMPUTE, Plan, Recompute, rows_of_rank
from mot_megatron.planning.memory import FP32, held_by_rank
from mot_megatron.scaling.costs import (
    Constants,
    WorkSeconds,
    adapted,
    collective_seconds,
    work_seconds,
)
from mot_megatron.scaling.forecast import (
    TIMED_PARTS,
    Split,
    part_split,
    reduces_under_backward,
    step_split,
)
from mot_megatron.scaling.ledger import BACKWARD, FORWARD, OPTIMIZER, REDUCTION, Ledger, Work
from mot_megatron.scaling.machine import GroupShape, Machine, group_shape

_LAYERS = (1, 2)
_AXES = (
    "tensor_model_parallel_size",
    "sequence_parallel",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "modality_parallel_size",
    "attention_exchange",
    "expert_model_parallel_size",
    "zero_stage",
)
_PREFETCHED = int(5e7)
"""Weights that ZeRO-3 gathers at once (stage3_prefetch_bucket_size)."""
_KEPT = int(5e8)
"""Weights that ZeRO-3 keeps from forward to backward: those whose two uses have at most 1e9 others
between them (stage3_max_reuse_distance)."""
_REDUCED_BYTES = 8
"""Bytes moved per weight when its gradient is divided by the number of ranks."""
_CLIPPED_BYTES = 8
"""The same when gradients that are not scattered are copied and scaled."""
_UPDATED_BYTES = 50
"""The same by AdamW, per weight that the rank updates; counted in rehearsals."""


@dataclass(frozen=True)
class Base:
    """Work of one micro-batch through all towers on one rank, by part of the step."""

    layer: Mapping[str, Work]
    """Of one layer."""
    rest: Mapping[str, Work]
    """Of embedding, head and loss."""


def base_configs(config: Config) -> dict[tuple[Recompute, int], Config]:
    """Return what to rehearse on one rank: by recomputation and number of layers."""
    plain = config.parallel.model_validate({})
    found = {}
    for mode, layers in product(RECOMPUTE, _LAYERS):
        training = {"recompute": mode, "global_batch_size": config.training.micro_batch_size}
        found[mode, layers] = config.model_copy(
            update={
                "parallel": plain,
                "model": config.model.model_copy(update={"num_layers": layers}),
                "training": config.training.model_copy(update=training),
            }
        )
    return found


def base_of(one_layer: Ledger, two_layers: Ledger) -> Base:
    """Return the work of a layer and of the rest from rehearsals of one and of two layers."""
    layer, rest = {}, {}
    for part in (FORWARD, BACKWARD):
        layer[part], rest[part] = Work(), Work()
        layer[part].add(two_layers.tally.work[part])
        layer[part].add(one_layer.tally.work[part], -1)
        rest[part].add(one_layer.tally.work[part])
        rest[part].add(layer[part], -1)
    return Base(layer, rest)


@dataclass(frozen=True)
class Estimate:
    """The time of a step in a layout."""

    plan: Plan
    recompute: Recompute
    seconds: float
    split: Split


def estimate(
    plan: Plan,
    recompute: Recompute,
    base: Base,
    tower_tokens: Sequence[int],
    machine: Machine,
    constants: Constants,
) -> Estimate:
    """Return the estimate for a layout.

    Args:
        plan: The layout. Its tensor parallelism must be with sequence parallelism.
        recompute: Recomputation.
        base: Of that recomputation.
        tower_tokens: Tokens of each tower, K of them; only their proportions count.
        machine: Where the step would run.
        constants: Of the software.
    """
    mesh, config = plan.mesh, plan.config
    assert mesh.tensor == 1 or config.parallel.sequence_parallel
    constants = adapted(constants, machine)
    layout = _Layout(plan, recompute, base, tuple(tower_tokens), machine, constants)
    last = mesh.pipeline - 1
    stages = range(mesh.pipeline)
    # Stages between the ends that have equally many layers do the same.
    kinds = [(stage == 0, stage == last, layout.layers(stage)) for stage in stages]
    of_kind = {
        kind: [layout.splits(stage, place) for place in range(mesh.modality)]
        for stage, kind in enumerate(kinds)
        if kinds.index(kind) == stage
    }
    parts = {
        part: [[place[part] for place in of_kind[kind]] for kind in kinds] for part in TIMED_PARTS
    }
    message = 0.0
    if mesh.pipeline > 1:
        shape = layout.shape(mesh.pipeline_groups()[0])
        message = layout.seconds("send", layout.row_bytes / mesh.tensor, shape)
    pieces = config.parallel.virtual_pipeline_model_parallel_size or 1
    overlap = constants.overlap if layout.reduces_under_backward else 0.0
    split = step_split(parts, plan.accumulation, pieces, message, overlap)
    return Estimate(plan, recompute, sum(split.values()), split)


@dataclass
class _Held:
    """Weights of a rank that the same ranks hold."""

    shape: GroupShape
    """Of these ranks."""
    size: int = 0
    """Weights in all."""
    vectors: int = 0
    """Number of parameters that are vectors."""


@dataclass(frozen=True)
class _Layout:
    """A layout with all that its times depend on."""

    plan: Plan
    recompute: Recompute
    base: Base
    tower_tokens: tuple[int, ...]
    machine: Machine
    constants: Constants

    @property
    def element(self) -> int:
        """Bytes of a weight or activation in forward."""
        return 2 if self.plan.config.training.precision == "bf16" else FP32

    @property
    def positions(self) -> int:
        """Positions of a micro-batch."""
        config = self.plan.config
        return config.training.micro_batch_size * config.data.seq_length

    @property
    def reduces_under_backward(self) -> bool:
        """Whether the engine reduces gradients under the last backward pass."""
        return reduces_under_backward(self.plan.config)

    @property
    def row_bytes(self) -> int:
        """Bytes of the residual stream of a micro-batch."""
        return self.positions * self.plan.config.model.hidden_size * self.element

    def shape(self, ranks: Sequence[int]) -> GroupShape:
        """Return the shape of a group of ranks on the machine."""
        return group_shape(ranks, int(self.machine.devices_per_node))

    def seconds(self, kind: str, num_bytes: float, shape: GroupShape, times: int = 1) -> float:
        """Return the seconds of equal collectives that transfer ``num_bytes`` together."""
        if shape.size == 1 or not times:
            return 0.0
        each = collective_seconds(
            kind, round(num_bytes / times), shape, self.machine, self.constants
        )
        return times * each

    def splits(self, stage: int, place: int) -> dict[str, Split]:
        """Return the seconds of each part of the step, over all micro-batches, on a rank."""
        rank = (stage * self.plan.mesh.data + place) * self.plan.mesh.tensor
        weights = self._weights(rank)
        return {part: self._split(part, stage, rank, weights) for part in TIMED_PARTS}

    def _split(self, part: str, stage: int, rank: int, weights: Mapping[str, _Held]) -> Split:
        traffic: defaultdict[str, float] = defaultdict(float)
        work, launches = WorkSeconds(), 0.0
        if part in (FORWARD, BACKWARD):
            work, launches = self._pass(part, stage, rank)
            for axis, seconds in self._pass_traffic(part, stage, rank).items():
                traffic[axis] += self.plan.accumulation * seconds
        for axis, held in weights.items():
            times = self.plan.accumulation if part in (FORWARD, BACKWARD) else 1
            traffic[axis] += times * self._weight_traffic(part, held)
            if part == BACKWARD:
                # Tensor-parallel ranks have copies of vectors, which each get a part of the rows.
                copies = self.shape(range(self.plan.mesh.tensor))
                each = self.seconds("all-reduce", FP32 * held.vectors, copies, held.vectors)
                traffic["tensor"] += times * each
        if part in (REDUCTION, OPTIMIZER):
            work = WorkSeconds(memory=self._weight_bytes(part, weights) / self._bandwidth)
        starting = launches * self.machine.launch_us * 1e-6
        return part_split(work, starting, {axis: s for axis, s in traffic.items() if s})

    @property
    def _bandwidth(self) -> float:
        return self.machine.memory_tb_per_s * 1e12 * self.constants.memory_efficiency

    def _weights(self, rank: int) -> dict[str, _Held]:
        """Return the weights of a rank by the axis whose ranks hold them together."""
        mesh, placement, config = self.plan.mesh, self.plan.placement, self.plan.config
        names = config.model.tower_names
        found: dict[str, _Held] = {}
        for each in held_by_rank(config, mesh, placement, rank):
            holders: Sequence[int] = range(mesh.modality)
            axis = "data"
            if placement is not None and each.tower >= 0:
                holders = placement.holders(each.tower)
                axis = f"tower {names[each.tower]}" if len(holders) < mesh.modality else "data"
            spread = config.parallel.expert_model_parallel_size if each.experts else 1
            if spread > 1:
                axis = "expert data"
            held = found.get(axis)
            if held is None:
                groups = mesh.expert_data_groups(holders, spread)
                held = _Held(self.shape(next(group for group in groups if rank in group)))
                found[axis] = held
            held.size += each.size
            held.vectors += len(each.shape) == 1
        return found

    def _pass(self, part: str, stage: int, rank: int) -> tuple[WorkSeconds, float]:
        """Return the seconds of computation and the launches, over all micro-batches."""
        mesh, config, placement = self.plan.mesh, self.plan.config, self.plan.placement
        rows = rows_of_rank(config, mesh, placement, self.tower_tokens, rank)
        share = rows.stream / self.positions / mesh.tensor
        attended = 1 / mesh.tensor
        if config.parallel.attention_exchange == "heads":
            attended /= mesh.modality
        held = 1.0
        if placement is not None:
            held = len(placement.towers(mesh.modality_rank(rank))) / config.model.num_towers
        count = self.layers(stage)
        times = {"layer": count, "rest": int(stage == mesh.pipeline - 1)}
        total, launches = WorkSeconds(), 0.0
        for name, work in (("layer", self.base.layer[part]), ("rest", self.base.rest[part])):
            one = work_seconds(work, self.machine, self.constants)
            total.matrices += times[name] * one.matrices * share
            total.attention += times[name] * one.attention * attended
            total.memory += times[name] * one.memory * share
            launches += times[name] * work.launches * held
        steps = self.plan.accumulation
        whole = WorkSeconds(*(steps * s for s in (total.matrices, total.attention, total.memory)))
        return whole, steps * launches

    def layers(self, stage: int) -> int:
        """Return the number of layers of a stage."""
        return sum(len(piece.layers) for piece in pieces_of_stage(self.plan.config, stage))

    def _pass_traffic(self, part: str, stage: int, rank: int) -> dict[str, float]:
        """Return the seconds of traffic between the ranks of a replica, in one micro-batch."""
        mesh, config, placement = self.plan.mesh, self.plan.config, self.plan.placement
        model = config.model
        rows = rows_of_rank(config, mesh, placement, self.tower_tokens, rank)
        own = rows.stream * model.hidden_size * self.element
        towers = sum(slots > 0 for slots in rows.towers)
        count = self.layers(stage)
        found: dict[str, float] = {}

        tensor = self.shape(range(mesh.tensor))
        ends = int(stage == 0), int(stage == mesh.pipeline - 1)
        # Backward gathers the inputs of matrices again, and gradients of their outputs.
        gathers = {FORWARD: 2 * count + ends[1], BACKWARD: 4 * count + ends[0] + ends[1]}
        scatters = {FORWARD: 2 * count + ends[0], BACKWARD: 2 * count + ends[1]}
        parts = [FORWARD, BACKWARD] if part == BACKWARD and self.recompute == "full" else [part]
        losses = 2 * ends[1] if part == FORWARD else 0
        found["tensor"] = sum(
            self.seconds("all-gather", gathers[each] * own, tensor, gathers[each] * towers)
            + self.seconds("reduce-scatter", scatters[each] * own, tensor, scatters[each] * towers)
            for each in parts
        ) + self.seconds("all-reduce", losses * self.positions * FP32, tensor, losses)
        if mesh.modality > 1:
            group = self.shape(next(g for g in mesh.modality_groups() if rank in g))
            groups = model.num_query_groups or model.num_attention_heads
            wide = 1 + 2 * groups / model.num_attention_heads
            back = self.row_bytes
            if config.parallel.attention_exchange == "heads":
                back /= mesh.modality
            each_layer = sum(
                self.seconds("all-to-all", size / mesh.tensor, group) for size in (wide * own, back)
            )
            found["modality"] = len(parts) * count * each_layer
        found["expert"] = len(parts) * count * self._dispatch_seconds(rank, rows.towers)
        return found

    def _dispatch_seconds(self, rank: int, tower_rows: Sequence[int]) -> float:
        """Return the seconds to send the rows of a layer to their experts and back."""
        mesh, config, placement = self.plan.mesh, self.plan.config, self.plan.placement
        spread = config.parallel.expert_model_parallel_size
        seconds = 0.0
        if spread == 1:
            return seconds
        for tower, experts in enumerate(config.model.experts_of_towers):
            if experts is None or not tower_rows[tower]:
                continue
            holders = placement.holders(tower) if placement else range(mesh.modality)
            groups = mesh.expert_groups(holders, spread)
            shape = self.shape(next(group for group in groups if rank in group))
            rows = tower_rows[tower] * experts.experts_per_token / mesh.tensor
            size = rows * config.model.hidden_size * self.element
            seconds += self.seconds("all-to-all", 2 * size, shape, 2)
        return seconds

    def _weight_traffic(self, part: str, held: _Held) -> float:
        """Return the seconds of traffic of weights and gradients in one pass, or in the step."""
        stage, shape = self._zero_stage, held.shape
        gradients, weights = FP32 * held.size, self.element * held.size
        if stage == 3 and part in (FORWARD, BACKWARD):
            gathered = held.size if part == FORWARD else max(0, held.size - _KEPT)
            pieces = math.ceil(gathered / _PREFETCHED)
            seconds = self.seconds("all-gather", self.element * gathered, shape, pieces)
            if part == BACKWARD:
                buckets = math.ceil(held.size / LARGEST_BUCKET)
                seconds += self.seconds("reduce-scatter", gradients, shape, buckets)
            return seconds
        if stage == 3 and part == OPTIMIZER:
            # Small weights stay gathered; each is gathered when it has changed.
            return self.seconds("all-gather", self.element * held.vectors, shape, held.vectors)
        if part == REDUCTION and self.reduces_under_backward:
            buckets = math.ceil(held.size / REDUCED_TOGETHER)
            return self.seconds("reduce-scatter", gradients, shape, buckets)
        if (stage == 2 and part == BACKWARD) or (stage < 2 and part == REDUCTION):
            return self.seconds("all-reduce", gradients, shape)
        if stage in (1, 2) and part == OPTIMIZER:
            return self.seconds("all-gather", weights, shape)
        return 0.0

    @property
    def _zero_stage(self) -> int:
        return self.plan.config.parallel.zero_stage

    def _weight_bytes(self, part: str, weights: Mapping[str, _Held]) -> float:
        """Return the bytes moved in memory by the reduction or the optimizer."""
        size = sum(held.size for held in weights.values())
        if part == REDUCTION:
            copies = self._zero_stage < 2 and not self.reduces_under_backward
            return _REDUCED_BYTES * size if copies else 0.0
        if self._zero_stage == 0:
            return (_CLIPPED_BYTES + _UPDATED_BYTES) * size
        updated = sum(held.size / held.shape.size for held in weights.values())
        return (_CLIPPED_BYTES * size if self._zero_stage == 1 else 0) + _UPDATED_BYTES * updated


def overrides_of(found: Estimate) -> dict[str, Any]:
    """Return the tables of a configuration with the layout, as in ``scaling.layouts``."""
    given = found.plan.config.parallel.model_dump(mode="json", exclude_none=True)
    return {
        "parallel": {key: given[key] for key in _AXES if key in given},
        "training": {"recompute": found.recompute},
    }
