"""Model state in closed form: the bytes of weights, gradients and optimizer on a rank.

DeepSpeed stores a rank's parameters in one flat buffer per group. A group has the parameters with
the same owners and learning rate; matrices and vectors are in separate groups, and with expert
parallelism an expert has fewer owners than its tower. ZeRO-1 in bf16 divides large groups. Each
buffer is padded so that the owners get equal pieces at even offsets. ZeRO-3 pads each parameter
instead. With this padding, the numbers are exact. Weights of frozen towers are in no buffer: they
are stored in the precision of forward alone, and only ZeRO-3 shards them.

Communication buffers are not counted: a rank needs one for gradients, of the size of its weights
but at most 200 M elements, and with ZeRO-3 the gathered weights of a layer. DeepSpeed's host copies
for an offloaded optimizer are not counted either.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, islice

from mot_megatron.config import Config
from mot_megatron.model.inventory import HeldParameter, held_parameters
from mot_megatron.model.sharding import SHARED
from mot_megatron.parallel.buckets import buckets, largest_bucket
from mot_megatron.parallel.mesh import Mesh
from mot_megatron.parallel.placement import Placement
from mot_megatron.planning.activations import Rows

FP32 = 4
_COPIES = 3
"""fp32 tensors of the optimizer: weight, exp_avg and exp_avg_sq."""
_EVEN = 2
"""The pieces of a buffer start at multiples of this many elements."""


@dataclass(frozen=True)
class StateBytes:
    """Bytes of one rank between backward and step, with two or more micro-batches per step."""

    weights: int
    """Weights that the forward pass reads."""
    gradients: int
    optimizer: int
    """Both moments, and fp32 weights unless the forward pass reads the same tensors."""
    host: int = field(default=0, compare=False)
    """The part that is in host memory because the optimizer is offloaded."""

    @property
    def total(self) -> int:
        """Bytes of all three together."""
        return self.weights + self.gradients + self.optimizer

    @property
    def device(self) -> int:
        """The part that is in device memory."""
        return self.total - self.host


@dataclass(frozen=True)
class RankMemory:
    """Memory of one rank."""

    stage: int
    towers: tuple[str, ...]
    """Names of the towers that the rank holds."""
    state: StateBytes
    activations: int
    """Peak of the bytes that autograd saves."""
    rows: Rows
    """Rows of the micro-batch that needs the most memory."""


def mesh_of(config: Config, world_size: int) -> Mesh:
    """Return the mesh of a configuration; its axes must divide ``world_size``."""
    parallel = config.parallel
    return Mesh(
        world_size,
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.modality_parallel_size,
    )


def state_bytes(config: Config, mesh: Mesh, placement: Placement | None, rank: int) -> StateBytes:
    """Return the model state of a rank.

    Args:
        config: Resolved configuration.
        mesh: Mesh of the world.
        placement: Placement of the towers; None without modality parallelism.
        rank: Global rank.
    """
    held = held_by_rank(config, mesh, placement, rank)
    weight = 2 if config.training.precision == "bf16" else FP32
    trained = [parameter for parameter in held if not parameter.frozen]
    frozen = [parameter for parameter in held if parameter.frozen]
    zero_stage = config.parallel.zero_stage
    if zero_stage == 0:
        elements = sum(parameter.size for parameter in trained)
        moments = (_COPIES - 1) * FP32
        state = StateBytes(weight * elements, FP32 * elements, moments * elements)
    elif zero_stage == 3:
        state = _scattered(config, trained, mesh.data, weight)
    else:
        state = _flat(config, _buffers(config, trained, mesh, placement, rank), weight)
    kept = sum(parameter.size for parameter in frozen)
    if zero_stage == 3:
        kept = _scattered_elements(frozen, mesh.data)
    return replace(state, weights=state.weights + weight * kept)


def held_by_rank(
    config: Config, mesh: Mesh, placement: Placement | None, rank: int
) -> list[HeldParameter]:
    """Return the parameters of a global rank."""
    towers: Sequence[int] = range(config.model.num_towers)
    if placement is not None:
        towers = placement.towers(mesh.modality_rank(rank))
    return held_parameters(config, mesh.pipeline_rank(rank), towers)


@dataclass(frozen=True)
class _Buffer:
    """The parameters of one optimizer group on one rank."""

    sizes: tuple[int, ...]
    """Elements of each parameter, in the order of the buffer."""
    owners: int
    owner: int
    """Index of the rank among the owners."""

    @property
    def piece(self) -> int:
        """Elements per owner."""
        return -(-sum(self.sizes) // (_EVEN * self.owners)) * _EVEN

    @property
    def padded(self) -> int:
        """Elements of the whole buffer."""
        return self.piece * self.owners

    @property
    def touched(self) -> int:
        """Elements of all parameters that overlap this rank's piece, and padding.

        In fp32, ZeRO-2 sums gradients per parameter, so these remain whole.
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
    sizes: dict[tuple[tuple[int, ...], int, bool, float], list[int]] = defaultdict(list)
    factors = config.model.lr_mults
    everyone = tuple(range(mesh.modality))
    expert_size = config.parallel.expert_model_parallel_size
    for parameter in held:
        holders = everyone
        if placement is not None and parameter.tower != SHARED:
            holders = placement.holders(parameter.tower)
        stride = expert_size if parameter.experts else 1
        factor = 1.0 if parameter.tower == SHARED else factors[parameter.tower]
        sizes[holders, stride, len(parameter.shape) > 1, factor].append(parameter.size)
    group, place = divmod(mesh.data_rank(rank), mesh.modality)
    parallel, precision = config.parallel, config.training.precision
    largest = largest_bucket(parallel.zero_stage, precision, parallel.offload)
    found = []
    for (holders, stride, *_), of_group in sizes.items():
        following = iter(of_group)
        found += [
            _Buffer(
                tuple(islice(following, count)),
                # With expert parallelism, only every stride-th holder has the same experts.
                owners=mesh.data // mesh.modality * len(holders) // stride,
                owner=(group * len(holders) + holders.index(place)) // stride,
            )
            for count in buckets(of_group, largest)
        ]
    return found


def _flat(config: Config, buffers: Sequence[_Buffer], weight: int) -> StateBytes:
    """Return the state with ZeRO-1 or ZeRO-2; ZeRO-1 accumulates whole gradients."""
    pieces = sum(buffer.piece for buffer in buffers)
    offloaded = config.parallel.offload != "none"
    gradients = _gradients_of_flat(config, buffers, weight == FP32)
    padded = sum(buffer.padded for buffer in buffers)
    return _with_optimizer(weight * padded, gradients, pieces, pieces if offloaded else 0)


def _gradients_of_flat(config: Config, buffers: Sequence[_Buffer], in_fp32: bool) -> int:
    """Return the gradient elements on the device."""
    offloaded = config.parallel.offload != "none"
    pieces = sum(buffer.piece for buffer in buffers)
    whole = sum(sum(buffer.sizes) for buffer in buffers)
    if config.parallel.zero_stage == 2:
        if in_fp32:
            return 0 if offloaded else sum(buffer.touched for buffer in buffers)
        return pieces
    if in_fp32:
        return whole
    # They are in one flat buffer; with offload, pieces are copied out of it before the step.
    return whole + pieces if offloaded else sum(buffer.padded for buffer in buffers)


def _scattered(
    config: Config, held: Sequence[HeldParameter], owners: int, weight: int
) -> StateBytes:
    """Return the state with ZeRO-3, which also keeps vectors whole once they are gathered."""
    pieces = _pieces(held, owners)
    weights = weight * _scattered_elements(held, owners)
    if config.parallel.offload == "none":
        return _with_optimizer(weights, pieces, pieces, 0)
    return _with_optimizer(weights, 0, pieces, 2 * pieces)


def _scattered_elements(held: Sequence[HeldParameter], owners: int) -> int:
    """Return the elements of weights that a rank stores with ZeRO-3."""
    vectors = sum(parameter.size for parameter in held if len(parameter.shape) == 1)
    return _pieces(held, owners) + vectors


def _pieces(held: Sequence[HeldParameter], owners: int) -> int:
    return sum(-(-parameter.size // owners) for parameter in held)


def _with_optimizer(weights: int, gradients: int, pieces: int, host_gradients: int) -> StateBytes:
    """Return the state from bytes of weights and elements of the rest.

    An offloaded optimizer has gradients in host memory in addition to those on the device.
    """
    optimizer = _COPIES * FP32 * pieces
    host = optimizer + FP32 * host_gradients if host_gradients else 0
    return StateBytes(weights, FP32 * (gradients + host_gradients), optimizer, host)
