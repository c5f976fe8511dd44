"""Model state in closed form: the bytes of weights, gradients and optimizer on a rank.

DeepSpeed lays a rank's parameters out group by group (those that the same ranks own, matrices apart
from vectors; under expert parallelism fewer ranks own an expert than its tower), each in a flat
buffer that it pads so that the owners get equal pieces at even offsets. ZeRO-3 pads every parameter
by itself. With that, the numbers are those of the tensors.

Buffers of collectives are not model state: besides, a rank needs one for gradients of up to the
size of its weights and at most 200 M elements, and ZeRO-3 the gathered weights of a layer. Nor are
DeepSpeed's copies in host memory on the way to an offloaded optimizer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from mot_megatron.config import Config
from mot_megatron.model.inventory import HeldParameter, held_parameters
from mot_megatron.model.sharding import SHARED
from mot_megatron.parallel.mesh import Mesh
from mot_megatron.parallel.placement import Placement
from mot_megatron.planning.activations import Rows

FP32 = 4
_COPIES = 3
"""The optimizer's fp32 weight, exp_avg and exp_avg_sq."""
_EVEN = 2
"""DeepSpeed's pieces of a buffer begin at multiples of this many elements."""


@dataclass(frozen=True)
class StateBytes:
    """Of one rank, between backward and step, with at least two micro-batches per step."""

    weights: int
    """What forward reads."""
    gradients: int
    optimizer: int
    """fp32 weights, unless forward reads the same, and both moments."""
    host: int = field(default=0, compare=False)
    """How much of these lies in host memory, where the optimizer is offloaded."""

    @property
    def total(self) -> int:
        """All three."""
        return self.weights + self.gradients + self.optimizer

    @property
    def device(self) -> int:
        """What of them lies in the device's memory."""
        return self.total - self.host


@dataclass(frozen=True)
class RankMemory:
    """One rank's bytes."""

    stage: int
    towers: tuple[str, ...]
    """Held by the rank, by name."""
    state: StateBytes
    activations: int
    """The most that autograd keeps at one time."""
    rows: Rows
    """Of the micro-batch that needs most."""


def mesh_of(config: Config, world_size: int) -> Mesh:
    """The axes of a configuration on so many ranks, which they divide."""
    parallel = config.parallel
    return Mesh(
        world_size,
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.modality_parallel_size,
    )


def state_bytes(config: Config, mesh: Mesh, placement: Placement | None, rank: int) -> StateBytes:
    """Model state of a rank.

    Args:
        config: Resolved.
        mesh: Of the world.
        placement: None without modality parallelism.
        rank: In the world.
    """
    held = held_by_rank(config, mesh, placement, rank)
    weight = 2 if config.training.precision == "bf16" else FP32
    zero_stage = config.parallel.zero_stage
    if zero_stage == 0:
        elements = sum(parameter.size for parameter in held)
        moments = (_COPIES - 1) * FP32
        return StateBytes(weight * elements, FP32 * elements, moments * elements)
    if zero_stage == 3:
        return _scattered(config, held, mesh.data, weight)
    return _flat(config, _buffers(config, held, mesh, placement, rank), weight)


def held_by_rank(
    config: Config, mesh: Mesh, placement: Placement | None, rank: int
) -> list[HeldParameter]:
    """The parameters of a rank of the world."""
    towers: Sequence[int] = range(config.model.num_towers)
    if placement is not None:
        towers = placement.towers(mesh.modality_rank(rank))
    return held_parameters(config, mesh.pipeline_rank(rank), towers)


@dataclass(frozen=True)
class _Buffer:
    """Parameters of one group of the optimizer, on one rank."""

    sizes: tuple[int, ...]
    """Elements of every parameter, in the buffer's order."""
    owners: int
    owner: int
    """The rank's place among them."""

    @property
    def piece(self) -> int:
        """Elements of this rank's piece; all owners' are equal."""
        return -(-sum(self.sizes) // (_EVEN * self.owners)) * _EVEN

    @property
    def padded(self) -> int:
        """Elements of the whole buffer."""
        return self.piece * self.owners

    @property
    def touched(self) -> int:
        """Elements of the parameters that lie in this rank's piece, be it in part, and padding.

        Where fp32 gradients are summed one by one, those stay whole.
        """
        begin, end = self.piece * self.owner, self.piece * (self.owner + 1)
        stops = list(accumulate(self.sizes))
        whole = sum(
            size
            for size, stop in zip(self.sizes, stops, strict=True)
            if stop > begin and stop - size < end
        )
        return whole + end - max(begin, min(end, stops[-1]))


def _buffers(
    config: Config,
    held: Iterable[HeldParameter],
    mesh: Mesh,
    placement: Placement | None,
    rank: int,
) -> list[_Buffer]:
    sizes: dict[tuple[tuple[int, ...], int, bool], list[int]] = defaultdict(list)
    everyone = tuple(range(mesh.modality))
    expert_size = config.parallel.expert_model_parallel_size
    for parameter in held:
        holders = everyone
        if placement is not None and parameter.tower != SHARED:
            holders = placement.holders(parameter.tower)
        stride = expert_size if parameter.experts else 1
        sizes[holders, stride, len(parameter.shape) > 1].append(parameter.size)
    group, place = divmod(mesh.data_rank(rank), mesh.modality)
    return [
        _Buffer(
            tuple(of_group),
            # Every so many-th of the holders has the same experts.
            owners=mesh.data // mesh.modality * len(holders) // stride,
            owner=(group * len(holders) + holders.index(place)) // stride,
        )
        for (holders, stride, _), of_group in sizes.items()
    ]


def _flat(config: Config, buffers: Sequence[_Buffer], weight: int) -> StateBytes:
    """ZeRO 1, which sums whole gradients over micro-batches, and 2, which sums its pieces'."""
    pieces = sum(buffer.piece for buffer in buffers)
    offloaded = config.parallel.offload != "none"
    gradients = _gradients_of_flat(config, buffers, weight == FP32)
    padded = sum(buffer.padded for buffer in buffers)
    return _with_optimizer(weight * padded, gradients, pieces, pieces if offloaded else 0)


def _gradients_of_flat(config: Config, buffers: Sequence[_Buffer], in_fp32: bool) -> int:
    """Elements on the device."""
    offloaded = config.parallel.offload != "none"
    pieces = sum(buffer.piece for buffer in buffers)
    whole = sum(sum(buffer.sizes) for buffer in buffers)
    if config.parallel.zero_stage == 2:
        if in_fp32:
            return 0 if offloaded else sum(buffer.touched for buffer in buffers)
        return pieces
    if in_fp32:
        return whole
    # One flat buffer has all; where it is offloaded, pieces are cut out of many before the step.
    return whole + pieces if offloaded else sum(buffer.padded for buffer in buffers)


def _scattered(
    config: Config, held: Sequence[HeldParameter], owners: int, weight: int
) -> StateBytes:
    """ZeRO 3, which besides its pieces keeps whole vectors, once they have been gathered."""
    pieces = sum(-(-parameter.size // owners) for parameter in held)
    vectors = sum(parameter.size for parameter in held if len(parameter.shape) == 1)
    weights = weight * (pieces + vectors)
    if config.parallel.offload == "none":
        return _with_optimizer(weights, pieces, pieces, 0)
    return _with_optimizer(weights, 0, pieces, 2 * pieces)


def _with_optimizer(weights: int, gradients: int, pieces: int, host_gradients: int) -> StateBytes:
    """All of a rank: bytes of its weights, elements of the rest.

    An offloaded optimizer has gradients in host memory besides those on the device.
    """
    optimizer = _COPIES * FP32 * pieces
    host = optimizer + FP32 * host_gradients if host_gradients else 0
    return StateBytes(weights, FP32 * (gradients + host_gradients), optimizer, host)
