"""What a process does about its memory."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from mot_megatron.job.hardware import disable_malloc_trim
from tests.ranks import run_ranks

BLOCK = 1 << 24
"""Elements of 4 bytes: 64 MiB, 16,384 pages of 4 KiB."""
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
"""Not there on kernels without them."""


def faults_of_a_block() -> int:
    """Pages that the kernel had to find for a block that is written and freed."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(BLOCK)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def faults_before_and_after() -> tuple[int, int]:
    faults_of_a_block()
    before = faults_of_a_block()
    disable_malloc_trim()
    # Aligned blocks may not fit where the one before lay, but two of them leave room for a third.
    return before, min(faults_of_a_block() for _ in range(6))


@pytest.mark.skipif(
    HUGE_PAGES.exists() and "[always]" in HUGE_PAGES.read_text(),
    reason="with huge pages everywhere a block has too few pages to tell",
)
def test_freed_memory_is_used_again() -> None:
    ((before, after),) = run_ranks(faults_before_and_after, 1)
    assert before > 1000  # glibc gives it back: else this would show nothing
    assert after < 100
