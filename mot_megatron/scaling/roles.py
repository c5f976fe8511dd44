"""The distinct roles of the ranks of a layout, of which one rank each is rehearsed."""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mot_megatron.config import Config
from mot_megatron.planning.memory import mesh_of
from mot_megatron.scaling.ledger import Ledger


@dataclass(frozen=True)
class Role:
    """Ranks that do the same: same pipeline stage and same place in the modality group."""

    stage: int
    modality_rank: int
    rank: int
    """The first of these ranks."""


@dataclass(frozen=True)
class Rehearsed:
    """The ledger of a role, and what it cost to count it."""

    role: Role
    ledger: Ledger
    seconds: float
    host_bytes: int
    """Largest resident memory of the process that rehearsed it."""

    def document(self) -> dict[str, Any]:
        """Return the result as values that JSON can hold."""
        return {
            **asdict(self.role),
            **self.ledger.document(),
            "seconds": self.seconds,
            "host_bytes": self.host_bytes,
        }


def roles_of(config: Config, world_size: int) -> list[Role]:
    """Return the roles of a layout on ``world_size`` ranks, by stage and place."""
    mesh = mesh_of(config, world_size)
    found: dict[tuple[int, int], Role] = {}
    for rank in range(world_size):
        place = (mesh.pipeline_rank(rank), mesh.modality_rank(rank))
        found.setdefault(place, Role(*place, rank))
    return [found[place] for place in sorted(found)]


def with_micro_batches(config: Config, count: int, data_parallel_size: int) -> Config:
    """Return the configuration with as large a global batch as ``count`` micro-batches need."""
    batch = count * config.sequences_per_pass(data_parallel_size)
    training = config.training.model_copy(update={"global_batch_size": batch})
    return config.model_copy(update={"training": training})


def rehearse_role(
    config: Config, world_size: int, role: Role, shares: Sequence[float]
) -> Rehearsed:
    """Rehearse a role in this process, which must be a new one; see ``rehearsal.rehearse``."""
    # Here, because it imports DeepSpeed, which the command line must prepare for.
    from mot_megatron.scaling.rehearsal import rehearse

    begin = time.perf_counter()
    ledger = rehearse(config, world_size, role.rank, shares)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Rehearsed(role, ledger, time.perf_counter() - begin, peak)
