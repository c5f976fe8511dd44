"""Time one layer on two ranks: dense, with all towers on both, and with modality parallelism.

Every rank has one sequence, so the pair processes the same tokens in every variant. Each variant is
timed with and without the all-reduce of its weights' gradients that a training step needs, over the
ranks that hold the same weights. With modality parallelism, only one rank holds a tower, so its
gradients need no all-reduce.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from mot_megatron.benchmark.layer_variants import Benchmark, Variant
from mot_megatron.model.sharding import tower_of
from mot_megatron.parallel.groups import ProcessGroups, build_process_groups
from mot_megatron.parallel.mesh import Mesh
from mot_megatron.parallel.placement import balanced_placement

RANKS = 2
TOWERS = 2
_TIMEOUT = timedelta(minutes=5)


@dataclass(frozen=True)
class PairSettings:
    """The settings of all ranks of the pair."""

    tokens: int
    """Tokens per rank."""
    hidden: int
    heads: int
    repeats: int
    device: str
    dtype: torch.dtype


def measure_pair(rank: int, folder: str, settings: PairSettings) -> None:
    """Time all variants; run on every rank of a fresh pair of processes.

    Rank 0 writes ``folder``/seconds.pt: variant -> the pair's seconds in every round, without a
    warm-up round.
    """
    torch.set_num_threads(1)
    on_gpu = settings.device.startswith("cuda")
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=RANKS,
        timeout=_TIMEOUT,
    )
    try:
        steps = _steps(settings, device)
        seconds = _rounds(steps, settings.repeats, show=rank == 0)
        if rank == 0:
            torch.save(seconds, Path(folder) / "seconds.pt")
    finally:
        dist.destroy_process_group()


def _steps(settings: PairSettings, device: torch.device) -> dict[str, Callable[[], None]]:
    """Return a function per variant that runs one of its steps, by name."""
    apart = build_process_groups(1, device, placement=balanced_placement([1.0] * TOWERS, RANKS))
    together = replace(apart, modality=None, holders=(), placement=None, mesh=Mesh(RANKS, tensor=1))

    def setting(groups: ProcessGroups) -> Benchmark:
        return Benchmark(
            settings.tokens, settings.hidden, settings.heads, device, settings.dtype, groups
        )

    variants = [
        (setting(together).ours(1, "dense"), together),
        (setting(together).ours(TOWERS, f"mot-{TOWERS}"), together),
    ]
    variants += [
        (setting(apart).modality_parallel(TOWERS, f"mot-{TOWERS}-mp{RANKS}-{name}", name), apart)
        for name in ("sequence", "heads")
    ]
    steps: dict[str, Callable[[], None]] = {}
    for variant, groups in variants:
        steps[variant.name] = lambda variant=variant: _step(variant, None)
        steps[f"{variant.name} + gradients"] = lambda variant=variant, groups=groups: _step(
            variant, groups
        )
    return steps


def _step(variant: Variant, groups: ProcessGroups | None) -> None:
    variant.clear()
    variant.step()
    if groups is None:
        return
    of_group: dict[dist.ProcessGroup, list[torch.Tensor]] = {}
    for parameter in variant.layer.parameters():
        assert parameter.grad is not None
        group = groups.reduction_group(tower_of(parameter))
        of_group.setdefault(group, []).append(parameter.grad.flatten())
    for group, gradients in of_group.items():
        if group.size() > 1:
            dist.all_reduce(torch.cat(gradients), group=group)


def _rounds(
    steps: dict[str, Callable[[], None]], repeats: int, show: bool
) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order = random.Random(0)  # the same on both ranks
    total = (1 + repeats) * len(steps)
    with tqdm(total=total, ncols=100, delay=5, disable=None if show else True) as bar:
        for number in range(1 + repeats):
            for name in order.sample(list(steps), len(steps)):
                dist.barrier()
                began = time.perf_counter()
                steps[name]()
                if torch.cuda.is_initialized():
                    torch.cuda.synchronize()
                dist.barrier()
                if number > 0:
                    seconds[name].append(time.perf_counter() - began)
                bar.update()
    return seconds
