"""Collect the wheels of requirements.txt in a folder, for a machine without a package index.

Example: python tools/make_wheelhouse.py --python-version 3.12 --skip torch --skip setuptools
             --output wheelhouse

Run it on a machine with an index, for the Python of the other one. Packages that have no wheel
there (deepspeed is published as source only) are built; that works for packages without compiled
code, and the script says so if one has some. Packages that the other machine brings, such as its
own torch, are skipped with --skip. The folder then has a requirements.txt of its own.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEGACY_PLATFORMS = ("manylinux2014", "manylinux2010", "manylinux1")
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
UNCOMPILED = "-none-any.whl"


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--requirements",
        type=Path,
        default=ROOT / "requirements.txt",
        metavar="FILE",
        help="pinned packages, NAME==VERSION (default: requirements.txt of this repository)",
    )
    parser.add_argument(
        "--python-version",
        default=f"{sys.version_info.major}.{sys.version_info.minor}",
        metavar="X.Y",
        help="Python of the other machine (default: this one's)",
    )
    parser.add_argument(
        "--machine",
        default=platform.machine(),
        help="processor of the other machine, x86_64 or aarch64 (default: this one's)",
    )
    parser.add_argument(
        "--glibc",
        type=int,
        default=28,
        metavar="N",
        help="the other machine has glibc 2.N or later (default 28)",
    )
    parser.add_argument(
        "--skip", action="append", default=[], metavar="NAME", help="leave out; may be repeated"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the folder")
    parser.add_argument(
        "--dry-run", action="store_true", help="only print the commands that it would run"
    )
    options = parser.parse_args(arguments)
    if not re.fullmatch(r"3\.\d+", options.python_version):
        parser.error(f"--python-version {options.python_version}: expected 3.N, such as 3.12")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Collect the wheels; return 1 if a package has none and cannot be built."""
    options = parse_arguments(arguments)
    wanted = read_requirements(options.requirements, options.skip)
    if options.dry_run:
        print("\n".join(shlex.join(download_command(options, each)) for each in wanted))
        return 0
    options.output.mkdir(parents=True, exist_ok=True)
    problems = []
    for number, requirement in enumerate(wanted, 1):
        print(f"{number}/{len(wanted)}: {requirement}", flush=True)
        problem = collect(options, requirement)
        if problem:
            problems.append(problem)
            print(f"error: {problem}", file=sys.stderr, flush=True)
    (options.output / "requirements.txt").write_text("".join(f"{each}\n" for each in wanted))
    if problems:
        print(f"error: {len(problems)} of {len(wanted)} packages are missing", file=sys.stderr)
        return 1
    place = options.output
    print(f"{place}: {len(list(place.glob('*.whl')))} wheels; install them on the other machine:")
    print(
        f"  python -m pip install --no-index --find-links {place} --no-deps"
        f" --requirement {place}/requirements.txt"
    )
    return 0


def read_requirements(path: Path, skip: Sequence[str]) -> list[str]:
    """Return the requirements of a file, without those to skip."""
    lines = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
    left_out = {normalized(name) for name in skip}
    return [line for line in lines if line and normalized(line) not in left_out]


def normalized(requirement: str) -> str:
    """Return the name of a requirement, of which spellings differ in case and dashes."""
    return re.sub(r"[-_.]+", "-", re.split(r"[=<>!~\[; ]", requirement)[0]).lower()


def collect(options: argparse.Namespace, requirement: str) -> str:
    """Download or build the wheel of a requirement; return what is wrong, or an empty string."""
    if subprocess.run(download_command(options, requirement), capture_output=True).returncode == 0:
        return ""
    before = set(options.output.glob("*.whl"))
    # DeepSpeed would otherwise compile its operators, for this machine.
    built = subprocess.run(
        build_command(options, requirement),
        env={**os.environ, "DS_BUILD_OPS": "0"},
        capture_output=True,
        text=True,
    )
    if built.returncode:
        last = (built.stderr.strip().splitlines() or ["no message"])[-1]
        return f"{requirement}: has no wheel, and cannot be built: {last}"
    compiled = [
        path
        for path in set(options.output.glob("*.whl")) - before
        if not path.name.endswith(UNCOMPILED)
    ]
    if compiled and not is_for_this_machine(options):
        compiled[0].unlink()
        return f"{requirement}: has compiled code; build its wheel on a machine like the other one"
    return ""


def is_for_this_machine(options: argparse.Namespace) -> bool:
    """Return whether the other machine has the processor and the Python of this one."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return (options.python_version, options.machine) == (python, platform.machine())


def download_command(options: argparse.Namespace, requirement: str) -> list[str]:
    """Return the command that downloads a wheel for the other machine."""
    version = options.python_version.replace(".", "")
    words = [*PIP, "download", "--no-deps", "--only-binary=:all:", "--dest", str(options.output)]
    words += ["--python-version", options.python_version, "--implementation", "cp"]
    for abi in (f"cp{version}", "abi3", "none"):
        words += ["--abi", abi]
    systems = [f"manylinux_2_{minor}" for minor in range(options.glibc, 4, -1)]
    for system in (*systems, *LEGACY_PLATFORMS):
        words += ["--platform", f"{system}_{options.machine}"]
    return [*words, requirement]


def build_command(options: argparse.Namespace, requirement: str) -> list[str]:
    """Return the command that builds a wheel on this machine, with the packages that it has."""
    words = [*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    return [*words, str(options.output), requirement]


if __name__ == "__main__":
    sys.exit(main())
