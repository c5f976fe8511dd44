"""The ledger of a training step: the work and the traffic of one rank, counted.

A step has five parts: data, forward, backward, reduction (of gradients, after the last backward or
under it) and optimizer. Everything else that autograd runs is backward, recomputation included.
Collectives over a group of one rank send nothing and are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

DATA, FORWARD, BACKWARD = "data", "forward", "backward"
REDUCTION, OPTIMIZER = "reduction", "optimizer"
PARTS = (DATA, FORWARD, BACKWARD, REDUCTION, OPTIMIZER)
MATRICES, ATTENTION = "matrix products", "attention"
BACKWARD_OF_ATTENTION = 2.5
"""Matrix products of attention's backward over those of its forward: five instead of two, because
the kernels recompute the scores (FlashAttention-2, arXiv 2307.08691, section 3.1)."""


class Collective(NamedTuple):
    """One collective or message, as one rank takes part in it."""

    part: str
    """Part of the step."""
    kind: str
    """all-reduce, all-gather, reduce-scatter, all-to-all, broadcast, reduce, send or receive."""
    axis: str
    """The process group by its role; see ``parallel.axes.axes_of``."""
    group_size: int
    num_bytes: int
    """Bytes of the whole tensor: the result of an all-gather, the input of a reduce-scatter, what
    this rank sends in an all-to-all, otherwise the tensor itself."""


class Product(NamedTuple):
    """A batch of matrix products, [m, k] times [k, n]."""

    batch: int
    m: int
    k: int
    n: int
    element_bytes: int

    @property
    def flops(self) -> int:
        """FLOPs; a multiplication and an addition are two."""
        return 2 * self.batch * self.m * self.k * self.n

    @property
    def num_bytes(self) -> int:
        """Bytes of both factors and the product."""
        elements = self.m * self.k + self.k * self.n + self.m * self.n
        return self.batch * elements * self.element_bytes


@dataclass
class Work:
    """What a rank computes in one part of a step."""

    products: Counter[Product] = field(default_factory=Counter)
    """Matrix products, and how often each occurs."""
    attention_flops: int = 0
    """Pairs of a query and a visible key only."""
    attention_calls: int = 0
    memory_bytes: int = 0
    """Bytes that all other operators read and write, each for itself, as without fusion."""
    launches: int = 0
    """Operators that start a kernel, those above included."""

    @property
    def product_flops(self) -> int:
        """FLOPs of all matrix products."""
        return sum(product.flops * times for product, times in self.products.items())

    def add(self, other: Work, times: int = 1) -> None:
        """Add ``times`` times another part's work, which may be negative."""
        for product, count in other.products.items():
            self.products[product] += times * count
        self.attention_flops += times * other.attention_flops
        self.attention_calls += times * other.attention_calls
        self.memory_bytes += times * other.memory_bytes
        self.launches += times * other.launches

    def document(self) -> dict[str, Any]:
        """Return the work as values that JSON can hold."""
        return {
            "product_flops": self.product_flops,
            "attention_flops": self.attention_flops,
            "attention_calls": self.attention_calls,
            "memory_bytes": self.memory_bytes,
            "launches": self.launches,
            "products": [
                {**product._asdict(), "times": times} for product, times in self.products.items()
            ],
        }


@dataclass
class Memory:
    """Device memory of one rank in bytes, without the allocator's rounding and fragmentation."""

    state: int = 0
    """Before the step: weights, gradients, optimizer states and other buffers."""
    peak: int = 0
    """Largest sum of all tensors at any time in the step, with the operators of a CPU."""
    peak_part: str = ""
    """Part of the step in which that is."""
    peak_on_gpu: int = 0
    """The same with what a GPU's operators save for backward: its norms are fused."""


@dataclass
class Tally:
    """Work and traffic of a step, or of a part of its micro-batches."""

    work: dict[str, Work]
    """By part of the step."""
    traffic: Counter[Collective]
    """How often each collective occurs, in order of first use."""

    def plus(self, other: Tally, times: int) -> Tally:
        """Return the sum of this tally and ``times`` times another one."""
        work = {}
        for part in PARTS:
            work[part] = Work()
            work[part].add(self.work[part])
            work[part].add(other.work[part], times)
        traffic = Counter(self.traffic)
        for each, count in other.traffic.items():
            traffic[each] += times * count
        return Tally(work, Counter({each: count for each, count in traffic.items() if count}))


@dataclass
class Ledger:
    """What one rank does in one training step."""

    micro_batches: int
    """Micro-batches of the step on this rank."""
    tally: Tally
    order: list[Collective]
    """The collectives one by one, in the order in which the rank starts them, in a step of
    ``ordered_micro_batches``."""
    ordered_micro_batches: int
    memory: Memory
    members: dict[str, tuple[int, ...]]
    """Global ranks of the group of each axis."""
    tower_flops: dict[str, int] = field(default_factory=dict)
    """FLOPs of the matrix products of each tower by the closed form, without recomputation. The
    others of the ledger are those of the head, of components shared by towers and of routers."""

    def flops(self) -> Counter[str]:
        """Return the FLOPs of matrix products and of attention over the step."""
        parts = self.tally.work.values()
        return Counter(
            {
                MATRICES: sum(work.product_flops for work in parts),
                ATTENTION: sum(work.attention_flops for work in parts),
            }
        )

    def document(self) -> dict[str, Any]:
        """Return the ledger as values that JSON can hold."""
        return {
            "micro_batches": self.micro_batches,
            "flops": dict(self.flops()),
            "tower_flops": self.tower_flops,
            "work": {part: work.document() for part, work in self.tally.work.items()},
            "traffic": [
                {**each._asdict(), "times": times} for each, times in self.tally.traffic.items()
            ],
            "order": [each._asdict() for each in self.order],
            "ordered_micro_batches": self.ordered_micro_batches,
            "memory": asdict(self.memory),
        }


def extend(ledger: Ledger, tally: Tally, per: int, micro_batches: int) -> Ledger:
    """Return the ledger of a longer step, whose additional micro-batches all do the same.

    Args:
        ledger: A short step of the same rank.
        tally: What ``per`` more micro-batches add.
        per: Number of micro-batches.
        micro_batches: Micro-batches of the longer step.
    """
    times, rest = divmod(micro_batches - ledger.micro_batches, per)
    assert not rest, (ledger.micro_batches, per, micro_batches)
    return replace(
        ledger,
        micro_batches=micro_batches,
        tally=ledger.tally.plus(tally, times),
        tower_flops={
            name: flops * micro_batches // ledger.micro_batches
            for name, flops in ledger.tower_flops.items()
        },
    )


def traffic_by_axis(traffic: Mapping[Collective, int]) -> dict[tuple[str, str, str, int], tuple]:
    """Return count and total bytes by part, kind, axis and group size, in order of use."""
    found: dict[tuple[str, str, str, int], tuple[int, int]] = {}
    for each, times in traffic.items():
        key = each[:4]
        count, total = found.get(key, (0, 0))
        found[key] = (count + times, total + times * each.num_bytes)
    return found
