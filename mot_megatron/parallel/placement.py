"""Which towers each rank of a modality group holds, and which of their tokens it processes.

Letters: P ranks of a modality group, K towers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Placement:
    """Share of each tower's tokens on each rank of a modality group.

    A rank holds the weights of every tower of which it has a share. Every rank holds at least one
    tower, every tower is held by at least one rank, and a tower's shares sum to one.
    """

    shares: tuple[tuple[float, ...], ...]
    """[P][K], fraction of a tower's tokens on a rank."""

    @property
    def num_ranks(self) -> int:
        """Number of ranks, P."""
        return len(self.shares)

    @property
    def num_towers(self) -> int:
        """Number of towers, K."""
        return len(self.shares[0])

    def towers(self, modality_rank: int) -> tuple[int, ...]:
        """Return the towers that a rank holds, in ascending order."""
        return self._towers[modality_rank]

    def holders(self, tower: int) -> tuple[int, ...]:
        """Return the ranks of the group that hold a tower, in ascending order."""
        return tuple(rank for rank in range(self.num_ranks) if tower in self._towers[rank])

    @property
    def num_copies(self) -> int:
        """Number of tower copies in the group: towers held, summed over its ranks."""
        return sum(len(towers) for towers in self._towers)

    def cuts(self, tower: int, num_tokens: int) -> tuple[int, ...]:
        """Return the boundaries that split a tower's tokens over the ranks, P + 1 of them.

        Rank p processes tokens [cuts[p], cuts[p + 1]) of the tower's ``num_tokens``, an empty range
        if it does not hold the tower.
        """
        last = self.holders(tower)[-1]
        cuts, share = [0], 0.0
        for rank in range(self.num_ranks):
            share += self.shares[rank][tower]
            # The shares may sum to slightly less than one, so the last holder takes the rest.
            cuts.append(num_tokens if rank >= last else min(num_tokens, round(num_tokens * share)))
        return tuple(cuts)

    def loads(self, tower_flops: Sequence[float]) -> tuple[float, ...]:
        """Return the FLOPs per rank, P values, given the FLOPs of each tower's tokens."""
        return tuple(
            sum(share * flops for share, flops in zip(row, tower_flops, strict=True))
            for row in self.shares
        )

    @cached_property
    def _towers(self) -> tuple[tuple[int, ...], ...]:
        return tuple(
            tuple(tower for tower, share in enumerate(row) if share > 0) for row in self.shares
        )


def balanced_placement(tower_flops: Sequence[float], num_ranks: int) -> Placement:
    """Return the placement with the fewest tower copies and, among those, the lowest maximum load.

    With at least as many ranks as towers, every rank holds one tower, and the ranks of a tower
    share its tokens equally. With fewer ranks, every tower is on one rank.

    Args:
        tower_flops: FLOPs of each tower's tokens, K non-negative values.
        num_ranks: P.
    """
    if num_ranks >= len(tower_flops):
        return _one_tower_per_rank(tower_flops, num_ranks)
    return _one_rank_per_tower(tower_flops, num_ranks)


def _one_tower_per_rank(tower_flops: Sequence[float], num_ranks: int) -> Placement:
    towers = range(len(tower_flops))
    holders = [1 for _ in towers]
    # Greedy is optimal: give each further rank to the tower with the highest load per rank.
    for _ in range(num_ranks - len(towers)):
        busiest = max(towers, key=lambda tower: tower_flops[tower] / holders[tower])
        holders[busiest] += 1
    return Placement(
        tuple(
            tuple(1 / holders[tower] if tower == held else 0.0 for tower in towers)
            for held in towers
            for _ in range(holders[held])
        )
    )


def _one_rank_per_tower(tower_flops: Sequence[float], num_ranks: int) -> Placement:
    num_towers = len(tower_flops)
    best: tuple[tuple[float, ...], tuple[int, ...]] | None = None

    def search(ranks: tuple[int, ...]) -> None:
        """Try every assignment up to renumbering of ranks: a new rank is used in order."""
        nonlocal best
        used = max(ranks, default=-1) + 1
        if num_ranks - used > num_towers - len(ranks):
            return
        if len(ranks) == num_towers:
            loads = [0.0] * num_ranks
            for tower, rank in enumerate(ranks):
                loads[rank] += tower_flops[tower]
            candidate = (tuple(sorted(loads, reverse=True)), ranks)
            best = candidate if best is None else min(best, candidate)
            return
        for rank in range(min(used + 1, num_ranks)):
            search((*ranks, rank))

    search(())
    assert best is not None
    return Placement(
        tuple(tuple(float(rank == held) for held in best[1]) for rank in range(num_ranks))
    )
