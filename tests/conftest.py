"""Markers: every test that is not slow is fast."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests as fast, and skip those that need a GPU where there is none."""
    for item in items:
        if item.get_closest_marker("gpu"):
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        elif not item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.fast)
