"""What a launcher gives this process: its place in the job, and who started it."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from mot_megatron.errors import ConfigError
from mot_megatron.job.processes import Process

SECRET_VARIABLE = "MOT_JOB_SECRET"
"""Environment variable with a secret of the user's choice, the same on all nodes of one launch."""

_SHARED_VARIABLES = (SECRET_VARIABLE, "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID")
_STEP_VARIABLE = "SLURM_STEP_ID"
_RESTART_VARIABLE = "TORCHELASTIC_RESTART_COUNT"
_LAUNCHERS = ("deepspeed.launcher.launch", "torchrun", "torch.distributed.run")
_RUNNERS = ("deepspeed", "ds", "deepspeed.launcher.runner")
_SUPERVISORS = ("mot_megatron.cli.supervise", "supervise", "supervise.py")
_LARGEST_PORT = 65535


@dataclass(frozen=True)
class Launch:
    """The place of this process in its job."""

    rank: int
    size: int
    local_rank: int
    address: str
    """Host name or address of rank 0's node."""
    port: int
    """Port of rank 0's store."""
    is_on_one_node: bool
    """Whether the launcher says that all ranks are on this node."""
    launchers: tuple[Process, ...]
    """Processes that started this one and without which it should stop, innermost first."""
    identifiers: tuple[str | None, ...] = ()
    """Values of the variables that tell one launch from another on all of its nodes."""
    step: str | None = None
    """SLURM's job step; None outside SLURM."""
    restart: str | None = None
    """How often torchrun has restarted the ranks of this node; None without torchrun."""

    @property
    def key(self) -> bytes:
        """Secret with which ranks of one launch recognize each other; it is never sent.

        It covers the world size, ``MOT_JOB_SECRET`` and the job IDs of SLURM and torchrun, where
        they are set. On a single node it also covers the launcher's process, so two launches never
        share it. Two launches of the same size on the same nodes need one of the variables.
        """
        launcher = asdict(self.launchers[0]) if self.is_on_one_node and self.launchers else None
        return _digest([self.size, self.identifiers, launcher])

    @property
    def host_key(self) -> bytes:
        """Secret that only the ranks of one launch on one host share.

        It covers ``key`` and what may differ between the hosts of one launch: the launcher's
        process, SLURM's job step and torchrun's count of restarts.
        """
        launcher = asdict(self.launchers[0]) if self.launchers else None
        return _digest([self.key.hex(), self.port, launcher, self.step, self.restart])

    @property
    def host_key_may_recur(self) -> bool:
        """Whether a later launch may have the same ``host_key``: a shell started the ranks."""
        return not self.launchers and self.step is None


def _digest(values: list[Any]) -> bytes:
    return hashlib.sha256(json.dumps(values).encode()).digest()


def read_launch(variables: Mapping[str, str]) -> Launch:
    """Read the environment variables of a launcher; without them, the process is alone.

    Raises:
        ConfigError: A variable is missing or illegal.
    """
    if "RANK" not in variables and "WORLD_SIZE" not in variables:
        return Launch(0, 1, 0, "127.0.0.1", 0, is_on_one_node=True, launchers=())
    size = _integer(variables, "WORLD_SIZE", 1, None)
    rank = _integer(variables, "RANK", 0, size - 1)
    local_rank = _integer(variables, "LOCAL_RANK", 0, None)
    # deepspeed, torchrun
    local_size = variables.get("LOCAL_SIZE", variables.get("LOCAL_WORLD_SIZE"))
    address = variables.get("MASTER_ADDR", "127.0.0.1" if size == 1 else "")
    if not address:
        raise ConfigError("environment variable MASTER_ADDR is not set; a launcher sets it")
    lowest = 0 if size == 1 else 1
    default = {"MASTER_PORT": "0"} if size == 1 else {}
    port = _integer({**default, **variables}, "MASTER_PORT", lowest, _LARGEST_PORT)
    return Launch(
        rank,
        size,
        local_rank,
        address,
        port,
        is_on_one_node=local_size == str(size),
        launchers=_find_launchers(),
        identifiers=tuple(variables.get(name) for name in _SHARED_VARIABLES),
        step=variables.get(_STEP_VARIABLE),
        restart=variables.get(_RESTART_VARIABLE),
    )


def _integer(variables: Mapping[str, str], name: str, low: int, high: int | None) -> int:
    allowed = f"{low} or more" if high is None else f"{low} to {high}"
    if name not in variables:
        raise ConfigError(f"environment variable {name} is not set; a launcher sets it")
    try:
        value = int(variables[name])
    except ValueError:
        value = low - 1
    if value < low or (high is not None and value > high):
        raise ConfigError(
            f"environment variable {name} = {variables[name]!r}; allowed: an integer, {allowed}"
        )
    return value


def _find_launchers() -> tuple[Process, ...]:
    """Find the launcher among this process's ancestors, and the commands that started it.

    These are the deepspeed command and, around it, a supervisor.

    A script between the launcher and this process has inherited the rank, the launcher has none.
    A shell that starts ranks by hand is not a launcher: it may end before they do.
    """
    launchers = []
    with contextlib.suppress(psutil.Error):
        process = psutil.Process().parent()
        while process is not None and "RANK" in (process.as_dict(["environ"])["environ"] or {}):
            process = process.parent()
        if process is not None and _runs(process, _LAUNCHERS):
            launchers.append(Process.of(process.pid))
            for programs in (_RUNNERS, _SUPERVISORS):
                process = process.parent()
                if process is None or not _runs(process, programs):
                    break
                launchers.append(Process.of(process.pid))
    return tuple(launchers)


def _runs(process: psutil.Process, programs: tuple[str, ...]) -> bool:
    """Return whether a process runs one of ``programs``, as a script or with ``python -m``."""
    words = [Path(word).name for word in process.cmdline()[:5]]
    return any(word in programs for word in words)
