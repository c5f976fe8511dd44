"""The hardware of a run: device name for reports, peak FLOP/s for MFU, memory."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_A100 = {"bf16": 312e12, "fp32": 19.5e12}
_HOPPER_SXM = {"bf16": 989e12, "fp32": 67e12}
_HOPPER_NVL = {"bf16": 835e12, "fp32": 60e12}
_DATA_SHEET: dict[str, dict[str, float]] = {
    "NVIDIA A100-SXM4-40GB": _A100,
    "NVIDIA A100-SXM4-80GB": _A100,
    "NVIDIA A100-PCIE-40GB": _A100,
    "NVIDIA A100 80GB PCIe": _A100,
    "NVIDIA H100 80GB HBM3": _HOPPER_SXM,
    "NVIDIA H100 NVL": _HOPPER_NVL,
    "NVIDIA H100 PCIe": {"bf16": 756e12, "fp32": 51e12},
    "NVIDIA H200": _HOPPER_SXM,
    "NVIDIA H200 NVL": _HOPPER_NVL,
    "NVIDIA B200": {"bf16": 2250e12},
    "NVIDIA L40S": {"bf16": 362e12, "fp32": 91.6e12},
}
"""Dense FLOP/s from NVIDIA's data sheets, fp32 without TF32, by the full name of the device.

Variants of one chip differ: a name that is not here, such as that of a part of a GPU, is no match.
"""
_MEASURED_SIZE = 1024
# Parameters of mallopt(3), from glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_NEVER = 2**31 - 1
_MEASURED_REPEATS = 10


def device_name(device: torch.device) -> str:
    """Return the model name of the GPU, or of the CPU with its number of available cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor_name()}, {len(os.sched_getaffinity(0))} cores"


def _processor_name() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return what measurements ran on, as a dictionary for reports.

    It includes the load average, which shows whether other processes were running.
    """
    return {
        "cpu": _processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def peak_flops(device: torch.device, precision: str) -> float:
    """Return the peak FLOP/s of one device, the reference for MFU.

    For a known GPU this is the value of its data sheet, otherwise that of a measured matmul.
    """
    if device.type == "cuda":
        known = _DATA_SHEET.get(device_name(device), {}).get(precision)
        if known is not None:
            return known
    return _measured_flops(device, torch.bfloat16 if precision == "bf16" else torch.float32)


def _measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    matrix = torch.randn(_MEASURED_SIZE, _MEASURED_SIZE, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(_MEASURED_REPEATS + 1):
        synchronize(device)
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * _MEASURED_SIZE**3 / best


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its queued work; does nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def disable_malloc_trim() -> None:
    """Make malloc reuse freed memory instead of returning it to the kernel.

    By default glibc returns large blocks at once, so every training step on a CPU faults in the
    pages of its activations and logits again, which takes a tenth of a small model's step. This
    does nothing if the C library has no ``mallopt``.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, _NEVER)


def peak_memory_bytes(device: torch.device) -> int:
    """Return peak memory in bytes so far: of tensors on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux counts ru_maxrss in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_memory_of_fullest_rank(device: torch.device) -> int:
    """Return the largest ``peak_memory_bytes`` of all ranks. Collective over the world.

    Ranks differ in the towers and stages that they hold.
    """
    largest = torch.tensor(peak_memory_bytes(device), device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)
