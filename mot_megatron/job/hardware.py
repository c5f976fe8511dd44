"""What the run runs on: its name for reports, its peak for MFU, its memory."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import time
from pathlib import Path
from typing import Any

import torch

# Dense bf16 and fp32 (TF32 off) FLOP/s from NVIDIA's data sheets.
_DATA_SHEET: dict[str, dict[str, float]] = {
    "H200": {"bf16": 989e12, "fp32": 67e12},
    "H100": {"bf16": 989e12, "fp32": 67e12},
    "A100": {"bf16": 312e12, "fp32": 19.5e12},
    "L40S": {"bf16": 362e12, "fp32": 91.6e12},
}
_MEASURED_SIZE = 1024
# Of mallopt(3), from glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_NEVER = 2**31 - 1
_MEASURED_REPEATS = 10


def device_name(device: torch.device) -> str:
    """Model name of the GPU, or of the processor with its number of cores."""
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
    """What figures were measured on; the load tells whether others worked there too."""
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
    """FLOP/s that MFU is relative to: the data sheet's, or else that of a measured matmul."""
    name = device_name(device)
    for model, peaks in _DATA_SHEET.items():
        if device.type == "cuda" and model in name:
            return peaks[precision]
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
    """Wait for the device's queued work; nothing is queued on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, for what it allocates next.

    glibc gives large blocks back at once, so that a training step on a CPU asks for its activations
    and logits anew, page by page: a tenth of a small model's step. Where the C library has no such
    setting, nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, _NEVER)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory in use so far: tensors on a GPU, the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux counts ru_maxrss in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
