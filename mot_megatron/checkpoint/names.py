"""Names in a run's checkpoints: their folder, and the prefixes of tensors.

A parameter's tensors are ``weight/<parameter>``, ``exp_avg/<parameter>`` and
``exp_avg_sq/<parameter>``, so the prefix ``weight/`` selects the weights alone.
"""

from __future__ import annotations

from pathlib import Path

WEIGHT_PREFIX = "weight/"
STATE_KINDS = ("weight", "exp_avg", "exp_avg_sq")
"""Prefixes of a parameter's tensors, without the slash: the weight, then the optimizer's moments.
"""

CONTENTS, WEIGHTS_ONLY = "contents", "weights"
"""Key of a checkpoint's metadata, and its value if there is no optimizer state."""
MADE_FROM = "made_from"
"""Key of the checkpoints whose weights these are, or whose mean."""


def checkpoint_directory(run_directory: Path) -> Path:
    """Return the folder of a run's checkpoints."""
    return run_directory / "checkpoints"
