"""Import packages that only the builders need, at the time a builder runs."""

from __future__ import annotations

import importlib
from typing import Any

from mot_megatron.errors import DataError


def optional_package(module: str, distribution: str) -> Any:
    """Import ``module``.

    Raises:
        DataError: The module is not installed; the message names the distribution to install.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise DataError(
            f"package {distribution} is not installed; run pip install {distribution}, or install "
            "everything the builders need: pip install 'mot-megatron[corpus]'"
        ) from None
