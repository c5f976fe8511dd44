"""List the legal layouts of a configuration on a number of GPUs, and the memory each needs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, product
from typing import Literal

from mot_megatron.config import Config, ParallelConfig
from mot_megatron.errors import ConfigError
from mot_megatron.parallel.mesh import Mesh
from mot_megatron.parallel.placement import Placement
from mot_megatron.planning.activations import Device, Rows, activation_bytes
from mot_megatron.planning.host_memory import HostBytes, host_bytes
from mot_megatron.planning.memory import StateBytes, held_by_rank, mesh_of, state_bytes
from mot_megatron.planning.placing import check_placed, place_towers
from mot_megatron.rules import check, check_world_size

Recompute = Literal["none", "selective", "full"]
RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")
"""Modes in order of decreasing speed and decreasing memory."""
_PIECES_PER_STAGE = (None, 2, 4)


@dataclass(frozen=True)
class Plan:
    """A legal layout and the memory it needs.

    ``state`` and ``activations`` are those of the fullest rank, the one that needs the most device
    memory without recomputation.
    """

    config: Config
    mesh: Mesh
    placement: Placement | None
    state: StateBytes
    activations: Mapping[Recompute, int]
    needed: Mapping[Recompute, int]
    """Bytes of model state and activations on the device, by recomputation mode; maximum over
    ranks."""
    host: HostBytes
    """Host memory to start and to resume; each the maximum over ranks."""
    tokens: int
    """Tokens per rank and optimizer step; maximum over ranks."""

    @property
    def accumulation(self) -> int:
        """Micro-batches per rank and step."""
        return self.config.accumulation_steps(self.mesh.data)

    def recompute_for(self, memory: float) -> Recompute | None:
        """Return the least recomputation with which the layout fits; None if it does not fit."""
        return next((mode for mode in RECOMPUTE if self.needed[mode] <= memory), None)

    def order(self, memory: float) -> tuple[float, ...]:
        """Return the key that sorts layouts from the fastest expected to the slowest.

        Less recomputation comes first, then less communication, then less memory. Communication is
        compared by these criteria, in this order:

        - Tensor-parallel size times number of stages, lower first.
        - Tensor-parallel size, lower first: its collectives run inside every layer, whereas stages
          wait for each other.
        - Pieces per stage, fewer first.
        - Modality-parallel exchange: none, then sequences, then heads.
        - Expert parallelism: experts on one rank, then spread over several.
        - ZeRO stage, lower first: 2 reduces gradients in every micro-batch, 3 also gathers weights
          in every pass.

        Args:
            memory: Bytes of a device. Layouts that do not fit come last.
        """
        parallel = self.config.parallel
        mode = self.recompute_for(memory)
        exchange = 1 + int(parallel.attention_exchange == "heads")
        return (
            len(RECOMPUTE) if mode is None else RECOMPUTE.index(mode),
            parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size,
            parallel.tensor_model_parallel_size,
            parallel.virtual_pipeline_model_parallel_size or 1,
            exchange if parallel.modality_parallel_size > 1 else 0,
            int(parallel.expert_model_parallel_size > 1),
            parallel.zero_stage,
            self.needed[mode or RECOMPUTE[-1]],
        )


def legal_layouts(
    config: Config, num_gpus: int, gpus_per_node: int, tower_tokens: Sequence[int]
) -> list[Config]:
    """Return the configuration with each layout that training accepts and that makes sense.

    Tensor and modality parallelism communicate in every layer, so both together stay inside a node.
    Sequence parallelism always accompanies tensor parallelism: it saves memory at no cost. Sampling
    during training is switched off, because some layouts do not support it.

    Args:
        config: Configuration with ``model.vocab_size`` set.
        num_gpus: World size.
        gpus_per_node: Ranks on one node.
        tower_tokens: Tokens of each tower in the training split, K of them. They determine the
            placement of towers, and thereby whether a tower's ranks can share its experts equally.
    """
    logging = config.logging.model_copy(update={"sample_interval_steps": None})
    config = config.model_copy(update={"logging": logging})
    sizes = [size for size in range(1, num_gpus + 1) if num_gpus % size == 0]
    inside = [size for size in sizes if size <= gpus_per_node]
    layouts = []
    spreads = sizes if config.model.has_experts else [1]
    for tensor, stages, pieces, modality, experts, zero in product(
        inside, sizes, _PIECES_PER_STAGE, inside, spreads, (0, 1, 2, 3)
    ):
        if tensor * modality > gpus_per_node or (pieces and stages == 1):
            continue
        for exchange in ("sequence", "heads") if modality > 1 else ("sequence",):
            wanted = {
                "tensor_model_parallel_size": tensor,
                "sequence_parallel": tensor > 1,
                "pipeline_model_parallel_size": stages,
                "virtual_pipeline_model_parallel_size": pieces,
                "modality_parallel_size": modality,
                "attention_exchange": exchange,
                "expert_model_parallel_size": experts,
                "zero_stage": zero,
            }
            layout = _in_layout(config, wanted)
            if _is_legal(layout, num_gpus, tower_tokens):
                layouts.append(layout)
    return layouts


def _in_layout(config: Config, wanted: Mapping[str, object]) -> Config:
    """Apply the sizes; keep the configured layers and placement if they match these sizes."""
    parallel = config.parallel.model_copy(update=dict(wanted))
    fitting = parallel.model_copy(
        update={
            "pipeline_layers": _layers(parallel),
            "placement": _placement(parallel),
        }
    )
    return config.model_copy(update={"parallel": fitting})


def _layers(parallel: ParallelConfig) -> tuple[int, ...] | None:
    pieces = parallel.pipeline_model_parallel_size * (
        parallel.virtual_pipeline_model_parallel_size or 1
    )
    layers = parallel.pipeline_layers
    return layers if layers and len(layers) == pieces else None


def _placement(parallel: ParallelConfig) -> object:
    placement = parallel.placement
    matches = placement != "auto" and len(placement) == parallel.modality_parallel_size
    return placement if matches else "auto"


def _is_legal(config: Config, num_gpus: int, tower_tokens: Sequence[int]) -> bool:
    try:
        check(config, "layout")
        check_world_size(config, num_gpus)
        if config.model.has_experts or any(config.model.frozen_towers):
            check_placed(config, place_towers(config, tower_tokens), num_gpus)
    except ConfigError:
        return False
    return True


def plan(
    config: Config, num_gpus: int, tower_tokens: Sequence[int], device: Device = "cuda"
) -> Plan:
    """Compute the memory that a legal layout needs.

    Args:
        config: Resolved configuration with the layout.
        num_gpus: World size.
        tower_tokens: Tokens of each tower in the training split, K of them; only their proportions
            count. Micro-batches are assumed to have the same proportions; one with more tokens of
            the fullest rank's towers needs more.
        device: Device on which the model would run.
    """
    mesh = mesh_of(config, num_gpus)
    placement = place_towers(config, tower_tokens)
    ranks = list(_representative_ranks(config, mesh, placement))
    states = {rank: state_bytes(config, mesh, placement, rank) for rank in ranks}
    rows = {rank: rows_of_rank(config, mesh, placement, tower_tokens, rank) for rank in ranks}
    saved = {
        (rank, mode): _activations(config, mesh, rank, rows[rank], mode, device)
        for rank in ranks
        for mode in RECOMPUTE
    }
    hosts = [
        host_bytes(config, held_by_rank(config, mesh, placement, rank), states[rank].host)
        for rank in ranks
    ]
    fullest = max(ranks, key=lambda rank: states[rank].device + saved[rank, "none"])
    return Plan(
        config=config,
        mesh=mesh,
        placement=placement,
        state=states[fullest],
        activations={mode: saved[fullest, mode] for mode in RECOMPUTE},
        needed={
            mode: max(states[rank].device + saved[rank, mode] for rank in ranks)
            for mode in RECOMPUTE
        },
        host=HostBytes(max(h.start for h in hosts), max(h.resume for h in hosts)),
        tokens=max(row.stream for row in rows.values()) * config.accumulation_steps(mesh.data),
    )


def _representative_ranks(config: Config, mesh: Mesh, placement: Placement | None) -> Iterator[int]:
    """Yield one representative rank per memory profile.

    All tensor-parallel ranks need the same memory. So do all replicas, except with ZeRO-2 in fp32,
    where each stores in full every gradient that overlaps its piece.
    """
    parallel = config.parallel
    replicas = mesh.data // mesh.modality
    if parallel.zero_stage != 2 or config.training.precision != "fp32":
        replicas = 1
    seen = set()
    for stage, replica, place in product(
        range(mesh.pipeline), range(replicas), range(mesh.modality)
    ):
        shares = None if placement is None else placement.shares[place]
        if (stage, replica, shares) not in seen:
            seen.add((stage, replica, shares))
            yield ((stage * mesh.data) + replica * mesh.modality + place) * mesh.tensor


def rows_of_rank(
    config: Config,
    mesh: Mesh,
    placement: Placement | None,
    tower_tokens: Sequence[int],
    rank: int,
) -> Rows:
    """Return a rank's rows of a micro-batch with the training split's share of each tower."""
    positions = config.training.micro_batch_size * config.data.seq_length
    shares = (1.0,) * len(tower_tokens)
    if placement is not None:
        shares = placement.shares[mesh.modality_rank(rank)]
    held = accumulate(share * tokens for share, tokens in zip(shares, tower_tokens, strict=True))
    # With a sequence exchange, every rank contributes a micro-batch to its group. With a heads
    # exchange, the group shares one micro-batch, and every rank attends for all of it.
    is_shared = config.parallel.attention_exchange == "heads"
    of_group = positions * (1 if is_shared else mesh.modality)
    total = sum(tower_tokens)
    ends = [0, *(math.ceil(tokens / total * of_group) for tokens in held)]
    return Rows(tuple(end - begin for begin, end in pairwise(ends)), attended=positions)


def _activations(
    config: Config, mesh: Mesh, rank: int, rows: Rows, mode: Recompute, device: Device
) -> int:
    training = config.training.model_copy(update={"recompute": mode})
    recomputing = config.model_copy(update={"training": training})
    accumulation = config.accumulation_steps(mesh.data)
    return activation_bytes(recomputing, mesh.pipeline_rank(rank), rows, accumulation, device)
