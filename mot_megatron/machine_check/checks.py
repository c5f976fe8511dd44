"""A check, what it needs, and where it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from mot_megatron.machine_check.outcome import Outcome

TIMES_SUFFIX = ".times.json"
"""End of the names of files with the times of steps, which several checks may use."""


@dataclass(frozen=True)
class Context:
    """What all checks of a machine know; it is sent to their processes."""

    device: str
    """"cuda" or "cpu"."""
    num_devices: int
    """Ranks that the largest checks may use: GPUs, or processes on a CPU."""
    directory: Path
    """Folder of the report, with a folder ``logs`` for what checks write."""
    configs: Path
    """Folder of the configuration files that are shipped with the package."""
    environment: Mapping[str, str]
    """Environment variables of the jobs."""

    @property
    def on_gpu(self) -> bool:
        """Whether the checks run on GPUs."""
        return self.device == "cuda"

    def file(self, name: str) -> Path:
        """Return the path of a file of a check."""
        return self.directory / "logs" / name


@dataclass(frozen=True)
class Check:
    """One check, which runs in a process of its own."""

    name: str
    """Unique name: the part of the report, a slash, and what is checked."""
    function: str
    """``MODULE:FUNCTION`` that does the check. Its process alone imports the module, so that a
    package that is missing fails only the checks that need it."""
    seconds: float
    """How long it should take, at most, on a usual machine of the kind."""
    device: str | None = None
    """Kind of device that it needs; None for any."""
    num_devices: int = 1
    """Number of devices that it needs."""
    quick: bool = False
    """Whether it belongs to the shortest set."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the function, after its ``Context``."""

    def run(self, context: Context) -> Outcome:
        """Do the check in this process."""
        module, _, name = self.function.partition(":")
        function: Callable[..., Outcome] = getattr(import_module(module), name)
        return function(context, **self.settings)
