"""Checks of process groups: a world of one, and the links between several devices."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from mot_megatron.machine_check.checks import Context
from mot_megatron.machine_check.outcome import Outcome
from mot_megatron.scaling.calibrate import seconds_of

_GROUPS = 20
_SLOWEST_GROUP_SECONDS = 0.5
_MEASURED_BYTES = {"cpu": 1 << 22, "cuda": 1 << 28}
_SLOWEST_BYTES_PER_SECOND = 20e9
"""Between GPUs of a node: NVLink gives several times as much, PCIe about as much."""


def world_of_one(context: Context, *, binds_device: bool) -> Outcome:
    """Join a world of one rank, all-reduce, and make groups.

    Args:
        context: The machine.
        binds_device: Whether the process group is told its device, as training does it.
    """
    device = _device(context.device, 0)
    with tempfile.TemporaryDirectory() as folder, _world(folder, 0, 1, device, binds_device):
        value = torch.ones(4, device=device)
        dist.all_reduce(value)
        begin = time.monotonic()
        for _ in range(_GROUPS):
            dist.all_reduce(value, group=dist.new_group([0]))
        seconds = (time.monotonic() - begin) / _GROUPS
        right = bool((value == 1).all())
    numbers = {"seconds_per_group": seconds}
    seen = f"all-reduce {'right' if right else 'WRONG'}, {1e3 * seconds:.1f} ms per new group"
    if not right:
        return Outcome("FAIL", seen, "use another version of torch or NCCL", numbers)
    if seconds > _SLOWEST_GROUP_SECONDS:
        advice = "jobs of many ranks start slowly: they make a group per layout axis and tower"
        return Outcome("SLOW", seen, advice, numbers)
    return Outcome("PASS", seen, "", numbers)


def links(context: Context, *, world_size: int) -> Outcome:
    """Compare every kind of collective with its result, and time all-reduce and all-to-all."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_links_of_rank, (folder, world_size, context.device), nprocs=world_size)
        found = json.loads((Path(folder) / "links.json").read_text())
    if found["wrong"]:
        return Outcome(
            "FAIL",
            f"wrong results: {', '.join(found['wrong'])}",
            "links or their driver are broken: try NCCL_P2P_DISABLE=1 to find out which, and run"
            " the vendor's diagnosis",
            found,
        )
    rates = found["bytes_per_second"]
    seen = ", ".join(f"{kind} {rate / 1e9:.1f} GB/s" for kind, rate in rates.items())
    seen = f"{world_size} ranks, {found['bytes'] >> 20} MB: {seen} per rank"
    if context.on_gpu and min(rates.values()) < _SLOWEST_BYTES_PER_SECOND:
        return Outcome(
            "SLOW",
            seen,
            "GPUs communicate over PCIe or the host: look at nvidia-smi topo -m and"
            " NCCL_DEBUG=INFO; prefer pipeline to tensor parallelism",
            found,
        )
    return Outcome("PASS", seen, "", found)


def _links_of_rank(rank: int, folder: str, size: int, kind: str) -> None:
    """Check and time collectives; rank 0 writes what all ranks found."""
    device = _device(kind, rank)
    with _world(folder, rank, size, device, binds_device=True):
        wrong = [name for name, right in _results(rank, size, device).items() if not right]
        everyone: list[list[str]] = [[] for _ in range(size)]
        dist.all_gather_object(everyone, wrong)
        count = _MEASURED_BYTES[kind] // 4 // size * size
        whole, other = torch.zeros(count, device=device), torch.empty(count, device=device)
        times = {
            "all-reduce": _time(lambda: dist.all_reduce(whole), device),
            "all-to-all": _time(lambda: dist.all_to_all_single(other, whole), device),
        }
        # What a rank sends: 2 (n - 1) / n of the bytes in a ring, and (n - 1) / n.
        share = (size - 1) / size
        sent = {"all-reduce": 2 * share, "all-to-all": share}
        if rank == 0:
            document = {
                "bytes": 4 * count,
                "wrong": sorted({name for each in everyone for name in each}),
                "bytes_per_second": {
                    kind: 4 * count * sent[kind] / seconds for kind, seconds in times.items()
                },
            }
            (Path(folder) / "links.json").write_text(json.dumps(document))


def _time(operation: Callable[[], object], device: torch.device) -> float:
    return seconds_of(operation, device, repeats=4, rounds=5)


def _results(rank: int, size: int, device: torch.device) -> dict[str, bool]:
    """Return for every kind of communication whether its result is right on this rank."""
    ranks = torch.arange(size, device=device, dtype=torch.float32)
    found = {}
    value = torch.full((1000,), float(rank), device=device)
    dist.all_reduce(value)
    found["all-reduce"] = bool((value == ranks.sum()).all())
    gathered = torch.empty(size, 3, device=device)
    dist.all_gather_into_tensor(gathered, torch.full((1, 3), float(rank), device=device))
    found["all-gather"] = torch.equal(gathered, ranks[:, None].expand(size, 3))
    part = torch.empty(1, 3, device=device)
    dist.reduce_scatter_tensor(part, gathered.clone())
    found["reduce-scatter"] = bool((part == size * rank).all())
    # Rank r sends s + 1 rows with its number to rank s: as uneven as rows of experts are.
    rows = sum(range(1, size + 1))
    received = torch.empty(size * (rank + 1), device=device)
    dist.all_to_all_single(
        received,
        torch.full((rows,), float(rank), device=device),
        [rank + 1] * size,
        list(range(1, size + 1)),
    )
    found["all-to-all"] = torch.equal(received, ranks.repeat_interleave(rank + 1))
    message = torch.full((5,), -1.0, device=device)
    mine = torch.full((5,), float(rank), device=device)
    operations = [
        dist.P2POp(dist.isend, mine, (rank + 1) % size),
        dist.P2POp(dist.irecv, message, (rank - 1) % size),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    found["message"] = bool((message == (rank - 1) % size).all())
    return found


def _device(kind: str, rank: int) -> torch.device:
    return torch.device(kind, rank) if kind == "cuda" else torch.device(kind)


@contextlib.contextmanager
def _world(
    folder: str, rank: int, size: int, device: torch.device, binds_device: bool
) -> Iterator[None]:
    """Join a world over a file in ``folder``, and leave it at the end."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        device_id=device if on_gpu and binds_device else None,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()
