"""Memory settings of a process, and the peak of a device."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mot_megatron.job import hardware
from mot_megatron.job.hardware import disable_malloc_trim

TRIES = 12
BLOCK = 1 << 24
"""Elements of 4 bytes: 64 MiB, 16,384 pages of 4 KiB."""
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
"""Absent on kernels without transparent huge pages."""


def faults_of_a_block() -> int:
    """Return the number of page faults of writing and freeing one block."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(BLOCK)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def faults_before_and_after() -> tuple[int, int]:
    faults_of_a_block()
    before = faults_of_a_block()
    disable_malloc_trim()
    # Because of alignment, a block may not fit where the last one was freed, but after two blocks
    # a third fits.
    return before, min(faults_of_a_block() for _ in range(6))


def in_a_new_process() -> list[int]:
    script = f"from {__name__} import faults_before_and_after as f; print(*f())"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return [int(word) for word in done.stdout.split()]


@pytest.mark.skipif(
    HUGE_PAGES.exists() and "[always]" in HUGE_PAGES.read_text(),
    reason="with huge pages always on, a block has too few pages to measure",
)
def test_freed_memory_is_reused() -> None:
    # Addresses are random. In some processes another mapping is in the way of the heap, and malloc
    # then returns blocks all the same.
    results = []
    while len(results) < TRIES and not (results and results[-1] < 100):
        before, after = in_a_new_process()
        assert before > 1000  # by default glibc returns the memory, so that this proves something
        results.append(after)
    assert results[-1] < 100, results


@pytest.mark.parametrize(
    ("name", "precision", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H100 NVL", "fp32", 60),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", 1),
        ("NVIDIA B200", "fp32", 1),
        ("NVIDIA GeForce RTX 4090", "bf16", 1),
    ],
)
def test_the_peak_is_that_of_exactly_this_device(
    name: str, precision: str, teraflops: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that the data sheets do not name is measured, here as one teraflop per second."""
    monkeypatch.setattr(hardware, "device_name", lambda _: name)
    monkeypatch.setattr(hardware, "_measured_flops", lambda *_: 1e12)
    assert hardware.peak_flops(torch.device("cuda", 0), precision) == teraflops * 1e12
