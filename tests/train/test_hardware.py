"""What a process does about its memory."""

from __future__ import annotations

import resource

import torch

from mot_megatron.train.hardware import keep_freed_memory
from tests.ranks import run_ranks

BLOCK = 1 << 24
"""Elements of 4 bytes: 64 MiB, 16,384 pages of 4 KiB."""


def faults_of_a_block() -> int:
    """Pages that the kernel had to find for a block that is written and freed."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(BLOCK)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def faults_before_and_after() -> tuple[int, int]:
    faults_of_a_block()
    before = faults_of_a_block()
    keep_freed_memory()
    faults_of_a_block()
    return before, faults_of_a_block()


def test_freed_memory_is_used_again() -> None:
    ((before, after),) = run_ranks(faults_before_and_after, 1)
    assert before > 1000  # glibc gives it back: else this would show nothing
    assert after < 100
