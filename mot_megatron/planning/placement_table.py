"""A table of what each rank of a modality group holds."""

from __future__ import annotations

from collections.abc import Sequence

from mot_megatron.config import Config
from mot_megatron.parallel.mesh import Mesh
from mot_megatron.parallel.placement import Placement
from mot_megatron.planning.memory import StateBytes, held_by_rank, state_bytes

_HEADER = (
    f"{'rank':>4}  {'towers (share of their tokens)':<38} {'FLOPs':>6} {'parameters':>11}"
    f" {'weights':>10} {'gradients':>10} {'optimizer':>10}"
)


def placement_table(
    config: Config, mesh: Mesh, placement: Placement, tower_flops: Sequence[float]
) -> str:
    """Return a table with a line per rank of a modality group, at most 120 columns wide.

    Args:
        config: Resolved configuration.
        mesh: Mesh of the world.
        placement: Placement of the towers.
        tower_flops: FLOPs of each tower's tokens; only their proportions count.
    """
    loads = placement.loads(tower_flops)
    total = sum(loads) or 1.0
    lines = [_HEADER]
    for rank in range(placement.num_ranks):
        names = ", ".join(
            name if share == 1 else f"{name} ({share:.0%})"
            for name, share in zip(config.model.tower_names, placement.shares[rank], strict=True)
            if share > 0
        )
        parameters, held = _fullest_stage(config, mesh, placement, rank)
        lines.append(
            f"{rank:>4}  {_cut(names, 38):<38} {loads[rank] / total:>6.1%} {parameters:>11,}"
            f" {_bytes(held.weights):>10} {_bytes(held.gradients):>10} {_bytes(held.optimizer):>10}"
        )
    busiest = max(loads) * len(loads) / total
    lines.append(
        f"busiest rank: {busiest:.2f} times the mean FLOPs; {placement.num_copies} copies of towers"
    )
    if mesh.pipeline > 1:
        lines[-1] += "; parameters and bytes of the fullest stage"
    return "\n".join(lines)


def _fullest_stage(
    config: Config, mesh: Mesh, placement: Placement, modality_rank: int
) -> tuple[int, StateBytes]:
    """Return the parameters and bytes of a modality rank on its largest pipeline stage."""
    stages = []
    for stage in range(mesh.pipeline):
        rank = (stage * mesh.data + modality_rank) * mesh.tensor
        held = held_by_rank(config, mesh, placement, rank)
        stages.append(
            (sum(parameter.size for parameter in held), state_bytes(config, mesh, placement, rank))
        )
    return max(stages, key=lambda stage: stage[1].total)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
