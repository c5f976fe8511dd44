"""Markers: every test that is not slow is fast. Without a GPU, Triton interprets its kernels."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads it when it is imported, which megatron-core and DeepSpeed may do.
    os.environ["TRITON_INTERPRET"] = "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
collect_ignore_glob = [] if HAS_TRITON else ["model/fused/*"]


def pytest_report_header() -> list[str]:
    """Say what is left out."""
    missing = "Triton is not installed, so the tests of its kernels are left out; install it with"
    return [] if HAS_TRITON else [f"{missing} pip install -r requirements-tests.txt"]


def pytest_make_parametrize_id(val: object) -> str | None:
    """Name bytes by their length: their content may hold a time, and workers must agree on it."""
    return f"{len(val)}-bytes" if isinstance(val, bytes) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests as fast, and skip those that need a GPU where there is none."""
    for item in items:
        if item.get_closest_marker("gpu"):
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        elif not item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.fast)
