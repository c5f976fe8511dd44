"""The machines of a job: their names and ranks, and how launchers are started on them."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mot_megatron.errors import ConfigError
from mot_megatron.files import read_regular_file

LAUNCHER = (sys.executable, "-m", "deepspeed.launcher.runner", "--quiet")


@dataclass(frozen=True)
class Hosts:
    """Machines with equally many ranks each. Rank 0 runs on the first."""

    names: tuple[str, ...]
    slots: int
    """Ranks of one machine."""
    by_slurm: bool = False
    """Whether SLURM starts a launcher on every machine; otherwise the first does, with ssh."""

    def check(self, world_size: int) -> None:
        """Check that a number of ranks fills whole machines, or is on one.

        Raises:
            ConfigError: It does not.
        """
        most = self.slots * len(self.names)
        if world_size > most or (world_size > self.slots and world_size % self.slots):
            raise ConfigError(
                f"{world_size} ranks: {len(self.names)} hosts have {self.slots} slots each;"
                f" allowed: up to {self.slots}, or a multiple of it up to {most}"
            )

    def command(self, world_size: int, port: int, hostfile: Path) -> list[str]:
        """Write a host file for some of the machines; return the words before the module.

        Args:
            world_size: Number of ranks; see ``check``.
            port: Free port of the first machine.
            hostfile: File to write, which all machines see.
        """
        count = -(-world_size // self.slots)
        names, slots = self.names[:count], min(self.slots, world_size)
        hostfile.write_text("".join(f"{name} slots={slots}\n" for name in names))
        words = [*LAUNCHER, "--hostfile", str(hostfile), "--master_addr", names[0]]
        words += ["--master_port", str(port)]
        if not self.by_slurm:
            return words
        # SLURM_NODEID is set only inside of a task.
        script = f'exec {shlex.join(words)} --no_ssh --node_rank "$SLURM_NODEID" "$@"'
        return [
            *("srun", "--ntasks-per-node=1", "--kill-on-bad-exit=1", f"--nodes={count}"),
            *(f"--nodelist={','.join(names)}", "bash", "-c", script, "launcher"),
        ]


def read_hostfile(path: Path) -> Hosts:
    """Read a host file of DeepSpeed: lines of a name and slots=N.

    Raises:
        ConfigError: It cannot be read, or its lines are not as expected.
    """
    try:
        lines = read_regular_file(path).decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise ConfigError(f"{path}: cannot be read: {reason}") from None
    found: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=(\d+)", text)
        if match is None or match[1] in found or not int(match[2]):
            raise ConfigError(f"{path}: line {number}: {text!r}: expected NAME slots=N, once each")
        found[match[1]] = int(match[2])
    return _of_equal_slots(found, str(path))


def hosts_of_slurm(environment: Mapping[str, str]) -> Hosts:
    """Return the machines of this SLURM job.

    Args:
        environment: Its environment variables; RANKS_PER_NODE overrides the number of GPUs.

    Raises:
        ConfigError: This is no SLURM job, or the number of ranks per node is unknown.
    """
    nodes = environment.get("SLURM_JOB_NODELIST")
    slots = environment.get("RANKS_PER_NODE") or environment.get("SLURM_GPUS_ON_NODE") or ""
    if not nodes:
        raise ConfigError("--slurm: SLURM_JOB_NODELIST is not set; run this inside of a SLURM job")
    if not slots.isdigit() or not int(slots):
        raise ConfigError("--slurm: no GPUs in this job; request them, or set RANKS_PER_NODE")
    try:
        listed = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(f"--slurm: scontrol show hostnames {nodes} failed: {error}") from None
    return Hosts(tuple(listed.stdout.split()), int(slots), by_slurm=True)


def _of_equal_slots(found: Mapping[str, int], source: str) -> Hosts:
    if not found:
        raise ConfigError(f"{source}: no host in it; expected lines of NAME slots=N")
    if len(set(found.values())) > 1:
        raise ConfigError(f"{source}: the hosts have different numbers of slots; allowed: the same")
    return Hosts(tuple(found), next(iter(found.values())))
