"""Faults that a drill causes: what is done to a job or to its checkpoints."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

from mot_megatron.checkpoint.find import finished_checkpoints
from mot_megatron.job.local_job import Job
from mot_megatron.run.outcome import STOP_FILE

_FULL_DISK_BYTES = 4096
"""Size at which files stop to grow on the full disk."""


def kill_a_rank(job: Job, _run: Path, chance: random.Random) -> str:
    """SIGKILL one of the ranks that have started, or the launcher if none has."""
    ranks = job.ranks()
    if not ranks:
        return kill_the_launcher(job, _run, chance)
    rank = chance.randrange(len(ranks))
    _signal(ranks[rank], signal.SIGKILL)
    return f"rank {rank} of {len(ranks)} started ranks"


def kill_all_ranks(job: Job, run: Path, chance: random.Random) -> str:
    """SIGKILL all ranks that have started, or the launcher if none has."""
    ranks = job.ranks()
    if not ranks:
        return kill_the_launcher(job, run, chance)
    for pid in ranks:
        _signal(pid, signal.SIGKILL)
    return f"{len(ranks)} started ranks"


def suspend_a_rank(job: Job, run: Path, chance: random.Random) -> str:
    """SIGSTOP one of the ranks that have started; the watchdog notices after its timeout."""
    ranks = job.ranks()
    if not ranks:
        return kill_the_launcher(job, run, chance)
    rank = chance.randrange(len(ranks))
    _signal(ranks[rank], signal.SIGSTOP)
    return f"rank {rank} of {len(ranks)} started ranks"


def kill_the_launcher(job: Job, _run: Path, chance: random.Random) -> str:
    """SIGKILL the ``deepspeed`` process or one that it started which is not a rank."""
    ranks = set(job.ranks())
    launchers = [job.process.pid, *(pid for pid in job.descendants() if pid not in ranks)]
    if job.is_supervised:
        del launchers[0]
    if not launchers:
        return "none has started"
    number = chance.randrange(min(len(launchers), 2))
    _signal(launchers[number], signal.SIGKILL)
    return "its launch process" if number else "the deepspeed process"


def touch_the_stop_file(_job: Job, run: Path, _chance: random.Random) -> str:
    """Request a stop by the file in the run's folder, if the run has locked it already."""
    with contextlib.suppress(FileNotFoundError):
        (run / STOP_FILE).touch()
    return str(run / STOP_FILE)


def signal_a_rank(job: Job, _run: Path, chance: random.Random) -> str:
    """Send SIGTERM or SIGUSR1 to one rank, as a batch system does before the time is up."""
    kind = chance.choice((signal.SIGTERM, signal.SIGUSR1))
    ranks = job.ranks()
    if ranks:
        _signal(chance.choice(ranks), kind)
    return kind.name


def fill_the_disk(job: Job, _run: Path, _chance: random.Random) -> str:
    """Let no rank write past the first kilobytes of a file, as on a full disk (but with EFBIG)."""
    for pid in job.ranks():
        with contextlib.suppress(ProcessLookupError):
            hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (_FULL_DISK_BYTES, hard))
    return f"files end at {_FULL_DISK_BYTES} bytes"


Injection = Callable[[Job, Path, random.Random], str]
DURING_A_JOB: dict[str, Injection] = {
    "rank killed": kill_a_rank,
    "all ranks killed": kill_all_ranks,
    "rank suspended": suspend_a_rank,
    "launcher killed": kill_the_launcher,
    "stop file": touch_the_stop_file,
    "signal to a rank": signal_a_rank,
    "disk full": fill_the_disk,
}
"""Faults during a job; each returns what exactly it did."""
CORRUPTION = "checkpoint damaged"
KINDS = (*DURING_A_JOB, CORRUPTION)
MENDED = ("rank killed", "all ranks killed", "rank suspended", "launcher killed")
"""Faults after which a supervised job comes back by itself."""
STOPS = ("stop file", "signal to a rank")
"""Requests to stop, after which a job saves and ends with status 0."""


def damage_the_newest_checkpoint(checkpoints: Path, chance: random.Random) -> str | None:
    """Damage one file of the newest checkpoint; return how, or None if it is the only one."""
    finished = finished_checkpoints(checkpoints) if checkpoints.exists() else []
    if len(finished) < 2:
        return None
    folder = finished[0][1]
    file = chance.choice(sorted(path for path in folder.iterdir() if path.stat().st_size))
    size = file.stat().st_size
    way = chance.choice(("flip", "truncate", "remove", "zero", "remove the folder's files"))
    if way == "flip":
        place = chance.randrange(size)
        with file.open("r+b") as stream:
            stream.seek(place)
            (value,) = stream.read(1)
            stream.seek(place)
            stream.write(bytes([value ^ (1 << chance.randrange(8))]))
        return f"{file.name}: a bit of byte {place} flipped"
    if way == "truncate":
        os.truncate(file, chance.randrange(size))
        return f"{file.name}: truncated"
    if way == "zero":
        file.write_bytes(bytes(size))
        return f"{file.name}: zeros"
    if way == "remove":
        file.unlink()
        return f"{file.name}: removed"
    shutil.rmtree(folder)
    folder.mkdir()
    return f"{folder.name}: all files removed"


def _signal(pid: int, kind: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, kind)
