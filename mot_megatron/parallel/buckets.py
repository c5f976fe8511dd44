"""Buckets: parameters whose gradients are reduced together."""

from __future__ import annotations

from collections.abc import Iterable

REDUCED_TOGETHER = 40_000_000
"""Maximum number of elements in one reduce-scatter of ZeRO-1 in bf16, unless a single parameter is
larger: large enough for the full bandwidth, small enough that most run under backward. It is
Megatron-LM's default."""


def buckets(sizes: Iterable[int], largest: int | None) -> list[int]:
    """Divide parameters into runs of at most ``largest`` elements.

    Args:
        sizes: Elements of each parameter.
        largest: Maximum of a run of several parameters; None: all are one run.

    Returns:
        The number of parameters in each run, in order.
    """
    counts: list[int] = []
    elements = 0
    for size in sizes:
        if not counts or (largest is not None and elements + size > largest):
            counts.append(0)
            elements = 0
        counts[-1] += 1
        elements += size
    return counts


def largest_bucket(zero_stage: int, precision: str, offload: str) -> int | None:
    """Return the maximum number of elements in a parameter group; None: no maximum."""
    is_reduced_here = (zero_stage, precision, offload) == (1, "bf16", "none")
    return REDUCED_TOGETHER if is_reduced_here else None
