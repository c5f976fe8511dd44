"""Checks of what is installed, and of the limits of the host."""

from __future__ import annotations

import importlib
import os
import resource
import shutil
import sys
import sysconfig
import tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import psutil
from packaging.requirements import Requirement

from mot_megatron.errors import DataError
from mot_megatron.machine_check.checks import Context
from mot_megatron.machine_check.outcome import Outcome

_NEEDED_DESCRIPTORS = 4096
"""Rank 0 holds a connection per rank in each of two servers, and files of the run."""
_NEEDED_SHARED_BYTES = 1 << 30
"""NCCL and the data workers share memory of the host, some tens of MB per rank."""
_NEEDED_DISK_BYTES = 20 << 30
"""A few checkpoints of a model of a billion parameters."""


def check_software(context: Context) -> Outcome:
    """Look for the packages that the package requires, and import its C++ extension."""
    found: dict[str, Any] = {"python": sys.version.split()[0]}
    problems = []
    for requirement in _requirements():
        try:
            found[requirement.name] = version(requirement.name)
        except PackageNotFoundError:
            problems.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(found[requirement.name], prereleases=True):
            problems.append(
                f"{requirement.name} {found[requirement.name]} is not {requirement.specifier}"
            )
    try:
        importlib.import_module("mot_megatron.data._native")
    except ImportError as error:
        problems.append(f"the C++ extension cannot be imported ({error})")
    if context.on_gpu:
        problems += _cuda_problems(found)
    if problems:
        return Outcome(
            "FAIL",
            "; ".join(problems),
            "install requirements.txt; on a machine without a package index, from a folder that"
            " tools/make_wheelhouse.py has made elsewhere; build the extension with"
            " launch/environment.sh",
            found,
        )
    shown = ("python", "torch", "cuda", "nccl", "triton", "megatron-core", "deepspeed")
    return Outcome("PASS", ", ".join(f"{n} {found[n]}" for n in shown if n in found), "", found)


def _requirements() -> list[Requirement]:
    """Return what the package requires: that of a checkout, or of the installed package.

    Raises:
        DataError: It is neither.
    """
    checkout = Path(__file__).parents[2] / "pyproject.toml"
    if checkout.exists():
        lines = tomllib.loads(checkout.read_text(encoding="utf-8"))["project"]["dependencies"]
    else:
        try:
            lines = requires("mot-megatron") or []
        except PackageNotFoundError:
            raise DataError(f"{checkout}: absent, and mot-megatron is not installed") from None
    parsed = [Requirement(line) for line in lines]
    return [each for each in parsed if each.marker is None or each.marker.evaluate({"extra": ""})]


def _cuda_problems(found: dict[str, Any]) -> list[str]:
    import torch
    import torch.cuda.nccl

    found["cuda"] = torch.version.cuda
    found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    try:
        found["triton"] = version("triton")
    except PackageNotFoundError:
        return ["triton is missing, which torch.compile and FlexAttention need"]
    return []


def check_host(context: Context) -> Outcome:
    """Look at cores, memory, shared memory, descriptors, disk and the compiler."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    numbers = {
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "shared_memory_bytes": _free_bytes(Path("/dev/shm")),
        "descriptors": limit[0],
        "most_descriptors": limit[1],
        "disk_bytes": _free_bytes(context.directory),
        "load": os.getloadavg()[0],
        "compiler": _compiler(),
    }
    advice = []
    if numbers["compiler"] is None or not _has_headers():
        what = "a C compiler" if numbers["compiler"] is None else "Python's headers (Python.h)"
        text = f"{what} is missing"
        if context.on_gpu:
            todo = "install gcc and python3-dev: torch.compile and FlexAttention build with them"
            return Outcome("FAIL", text, todo, numbers)
        advice.append(f"{text}: without it torch.compile does not run")
    if numbers["descriptors"] < _NEEDED_DESCRIPTORS:
        advice.append(
            f"ulimit -n {min(limit[1], 65536)} before starting jobs of hundreds of ranks"
            if limit[1] >= _NEEDED_DESCRIPTORS
            else "raise the hard limit of open files for jobs of hundreds of ranks"
        )
    if numbers["shared_memory_bytes"] < _NEEDED_SHARED_BYTES:
        advice.append("give the container more shared memory, such as --shm-size=8g")
    if numbers["disk_bytes"] < _NEEDED_DISK_BYTES:
        advice.append("put run.directory on a disk with more room for checkpoints")
    if numbers["load"] > numbers["cores"]:
        advice.append("other processes use the cores: measured times are not those of the machine")
    seen = (
        f"{numbers['cores']} cores, load {numbers['load']:.1f},"
        f" {_gb(numbers['memory_bytes'])} memory, {_gb(numbers['shared_memory_bytes'])} free in"
        f" /dev/shm, {_gb(numbers['disk_bytes'])} free on disk, {limit[0]} descriptors of at most"
        f" {limit[1]}, compiler {numbers['compiler']}"
    )
    return Outcome("SLOW" if advice else "PASS", seen, "; ".join(advice), numbers)


def _free_bytes(path: Path) -> int:
    return shutil.disk_usage(path).free if path.exists() else 0


def _compiler() -> str | None:
    return next(filter(None, map(shutil.which, ("gcc", "cc", "clang"))), None)


def _has_headers() -> bool:
    return (Path(sysconfig.get_paths()["include"]) / "Python.h").exists()


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.0f} GB"
