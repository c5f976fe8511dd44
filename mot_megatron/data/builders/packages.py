"""Packages that only the builders need, imported when a builder runs."""

from __future__ import annotations

import importlib
from typing import Any

from mot_megatron.errors import DataError


def optional_package(module: str, distribution: str) -> Any:
    """Import ``module``.

    Raises:
        DataError: It is not installed; names the distribution to install.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise DataError(
            f"package {distribution} is not installed; pip install {distribution}, or all that "
            "corpora are built from: pip install 'mot-megatron[corpus]'"
        ) from None
