"""Memory settings of a process."""

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


@pytest.mark.skipif(
    HUGE_PAGES.exists() and "[always]" in HUGE_PAGES.read_text(),
    reason="with huge pages always on, a block has too few pages to measure",
)
def test_freed_memory_is_reused() -> None:
    ((before, after),) = run_ranks(faults_before_and_after, 1)
    assert before > 1000  # by default glibc returns the memory; otherwise this test proves nothing
    assert after < 100
