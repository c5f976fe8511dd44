"""Every layout of a configuration on a number of GPUs, and what its fullest rank would hold."""

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
from mot_megatron.planning.memory import StateBytes, mesh_of, state_bytes
from mot_megatron.planning.placing import check_experts_placed, place_towers
from mot_megatron.rules import check, check_world_size

Recompute = Literal["none", "selective", "full"]
RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")
"""From the fastest to the smallest."""
_PIECES_PER_STAGE = (None, 2, 4)


@dataclass(frozen=True)
class Plan:
    """A legal layout and its fullest rank, the one that needs most without recomputation."""

    config: Config
    mesh: Mesh
    placement: Placement | None
    state: StateBytes
    activations: Mapping[Recompute, int]
    needed: Mapping[Recompute, int]
    """Bytes on the device, model state and activations; of the rank that needs most then."""
    tokens: int
    """Of the rank that has most, in an optimizer step."""

    @property
    def accumulation(self) -> int:
        """Micro-batches per rank and step."""
        return self.config.accumulation_steps(self.mesh.data)

    def recompute_for(self, memory: float) -> Recompute | None:
        """The least recomputation with which the layout fits; None if it does not with any."""
        return next((mode for mode in RECOMPUTE if self.needed[mode] <= memory), None)

    @property
    def communication(self) -> tuple[int, ...]:
        """Sorts layouts: first those whose ranks talk and wait least.

        Tensor parallelism talks most, twice in every half of a layer; pipelines talk little, but
        stages wait for each other; modality parallelism talks around attention, expert parallelism
        around the experts, and so less than data parallelism over gradients; ZeRO-3 gathers weights
        in every pass.
        """
        parallel = self.config.parallel
        return (
            parallel.tensor_model_parallel_size,
            parallel.pipeline_model_parallel_size,
            parallel.virtual_pipeline_model_parallel_size or 1,
            parallel.modality_parallel_size,
            parallel.expert_model_parallel_size,
            parallel.zero_stage,
            int(parallel.attention_exchange == "heads"),
        )


def legal_layouts(
    config: Config, num_gpus: int, gpus_per_node: int, tower_tokens: Sequence[int]
) -> list[Config]:
    """The configuration in every layout that the rules of training allow, and that makes sense.

    Tensor and modality parallelism, which talk in every layer, stay together inside a node;
    sequence parallelism goes with tensor parallelism always, as it saves memory for nothing.
    Samples during training, which some layouts cannot draw, are given up.

    Args:
        config: With its vocabulary.
        num_gpus: Ranks.
        gpus_per_node: Of them on a node.
        tower_tokens: Of the training split, K of them: they place the towers, and a tower's
            experts need ranks that can share them equally.
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
    """With the layers and placement that the file lists, where they are meant for these sizes."""
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
    is_meant = placement != "auto" and len(placement) == parallel.modality_parallel_size
    return placement if is_meant else "auto"


def _is_legal(config: Config, num_gpus: int, tower_tokens: Sequence[int]) -> bool:
    try:
        check(config, "layout")
        check_world_size(config, num_gpus)
        if config.model.has_experts:
            check_experts_placed(config, place_towers(config, tower_tokens), num_gpus)
    except ConfigError:
        return False
    return True


def plan(
    config: Config, num_gpus: int, tower_tokens: Sequence[int], device: Device = "cuda"
) -> Plan:
    """What a legal layout needs.

    Args:
        config: Resolved, in the layout.
        num_gpus: Ranks.
        tower_tokens: Of the training split, K of them; only their proportions count. Micro-batches
            are taken to have the same; one with more tokens of the fullest rank's towers needs
            more.
        device: Where the model would run.
    """
    mesh = mesh_of(config, num_gpus)
    placement = place_towers(config, tower_tokens)
    ranks = list(_different_ranks(config, mesh, placement))
    states = {rank: state_bytes(config, mesh, placement, rank) for rank in ranks}
    rows = {rank: _rows(config, mesh, placement, tower_tokens, rank) for rank in ranks}
    kept = {
        (rank, mode): _activations(config, mesh, rank, rows[rank], mode, device)
        for rank in ranks
        for mode in RECOMPUTE
    }
    fullest = max(ranks, key=lambda rank: states[rank].device + kept[rank, "none"])
    return Plan(
        config=config,
        mesh=mesh,
        placement=placement,
        state=states[fullest],
        activations={mode: kept[fullest, mode] for mode in RECOMPUTE},
        needed={
            mode: max(states[rank].device + kept[rank, mode] for rank in ranks)
            for mode in RECOMPUTE
        },
        tokens=max(row.stream for row in rows.values()) * config.accumulation_steps(mesh.data),
    )


def _different_ranks(config: Config, mesh: Mesh, placement: Placement | None) -> Iterator[int]:
    """Ranks among which is one like any other: tensor-parallel ranks and replicas are alike.

    But for replicas under ZeRO-2 in fp32, which keep gradients whole that lie across pieces.
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


def _rows(
    config: Config,
    mesh: Mesh,
    placement: Placement | None,
    tower_tokens: Sequence[int],
    rank: int,
) -> Rows:
    """Of a micro-batch whose tokens are shared among towers as the split's are."""
    positions = config.training.micro_batch_size * config.data.seq_length
    shares = (1.0,) * len(tower_tokens)
    if placement is not None:
        shares = placement.shares[mesh.modality_rank(rank)]
    held = accumulate(share * tokens for share, tokens in zip(shares, tower_tokens, strict=True))
    # Ranks that exchange by sequence bring a micro-batch each to their group; those that exchange
    # heads share one, and attend for all of it.
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
