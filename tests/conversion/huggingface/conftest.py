"""Keep the transformers library away from networks and from the user's cache."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest

_CACHE = tempfile.TemporaryDirectory(prefix="modules")
# The library reads these when it is imported. It copies modelling files to the second.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = _CACHE.name


@pytest.fixture(scope="session", autouse=True)
def _no_modules_remain() -> Iterator[None]:
    yield
    _CACHE.cleanup()
