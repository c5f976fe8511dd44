"""Markers: every test that is not slow is fast. Without a GPU, Triton interprets its kernels."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads it when it is imported, which megatron-core and DeepSpeed may do.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests as fast, and skip those that need a GPU where there is none."""
    for item in items:
        if item.get_closest_marker("gpu"):
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        elif not item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.fast)
