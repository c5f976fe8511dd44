"""List the configuration files shipped with the package, or copy them to a folder.

Example: mot configs --copy configs
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from mot_megatron.cli.arguments import user_path
from mot_megatron.cli.command import run_command
from mot_megatron.errors import DataError

NAME = "configs"
PACKAGE = Path(__file__).resolve().parents[1]
INSTALLED, CHECKOUT = PACKAGE / "configs", PACKAGE.parent / "configs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command line."""
    parser.add_argument(
        "--copy",
        type=user_path,
        metavar="DIR",
        help="write the files to DIR, which must be new or empty",
    )


def run(options: argparse.Namespace) -> int:
    """List or copy the configuration files."""
    directory = config_directory()
    if options.copy is None:
        print("\n".join(listing(directory)))
        return 0
    copy(directory, options.copy)
    print(f"{options.copy}: {len(list(options.copy.rglob('*.toml')))} configuration files")
    return 0


def config_directory() -> Path:
    """Return the folder of the files: inside an installed package, or next to it in a checkout.

    Raises:
        DataError: Neither folder exists.
    """
    for directory in (INSTALLED, CHECKOUT):
        if (directory / "quickstart.toml").is_file():
            return directory
    raise DataError(f"no configuration files at {INSTALLED} or {CHECKOUT}")


def listing(directory: Path) -> Iterator[str]:
    """Yield a line with the folder, then one per file with the first sentence of its comment."""
    yield f"in {directory}:"
    files = sorted(directory.rglob("*.toml"), key=lambda path: (len(path.parts), path))
    names = {path: str(path.relative_to(directory)) for path in files}
    width = max(map(len, names.values()))
    for path, name in names.items():
        yield f"{name:{width}}  {first_sentence(path)}"


def first_sentence(path: Path) -> str:
    """Return the first sentence of the comment at the start of a configuration file."""
    comment: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#").strip())
    sentence, _, _ = f"{' '.join(comment)} ".partition(". ")
    return sentence.rstrip(". ")


def copy(source: Path, target: Path) -> None:
    """Copy the configuration files and their README files.

    Raises:
        DataError: The target is not empty or cannot be written.
    """
    try:
        if target.exists() and any(target.iterdir()):
            raise DataError(f"--copy {target}: the folder is not empty")
        ignore = shutil.ignore_patterns("__pycache__", "*.py")
        shutil.copytree(source, target, dirs_exist_ok=True, ignore=ignore)
    except OSError as error:
        raise DataError(f"{target}: cannot be written: {error.strerror or error}") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``mot configs``; return the exit status."""
    return run_command(NAME, __doc__, add_arguments, run, arguments)
