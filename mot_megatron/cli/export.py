"""What ``mot checkpoint weights``, ``to-hf`` and ``to-megatron`` share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol, TypeVar

from mot_megatron.cli.arguments import CHECKPOINT_HELP, add_verify_and_dry_run, user_path
from mot_megatron.cli.command import say

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from mot_megatron.checkpoint.manifest import Manifest
    from mot_megatron.conversion.source import CheckpointSource

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class _Plan(Protocol):
    @property
    def num_bytes(self) -> int: ...
    @property
    def left_out(self) -> Mapping[str, int]: ...


Plan = TypeVar("Plan", bound=_Plan)


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Add ``--dtype``."""
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        help="convert the weights (default: keep their dtype, which is fp32 after training)",
    )


def dtype_of(options: argparse.Namespace) -> torch.dtype | None:
    """Return the dtype of ``--dtype``; None without it."""
    import torch

    return None if options.dtype is None else getattr(torch, _DTYPES[options.dtype])


def add_export(parser: argparse.ArgumentParser) -> None:
    """Add the checkpoint, the new folder, ``--dtype``, ``--verify`` and ``--dry-run``."""
    parser.add_argument("source", type=user_path, metavar="SRC", help=CHECKPOINT_HELP)
    parser.add_argument("destination", type=user_path, metavar="DST", help="new folder to write")
    add_dtype(parser)
    add_verify_and_dry_run(parser)


def open_source(name: str, path: Path) -> CheckpointSource:
    """Open the checkpoint, and report the damaged ones that were skipped."""
    from mot_megatron.conversion.source import CheckpointSource

    source = CheckpointSource(path)
    for line in source.skipped:
        say(name, f"skipped {line}")
    return source


def export(
    options: argparse.Namespace,
    plan: Plan,
    description: str,
    write: Callable[[Plan, Path, bool], Manifest],
) -> int:
    """Report what is left out and what is written, and write it; return the exit status.

    Args:
        options: See ``add_export``.
        plan: What to write.
        description: The weights of the plan, for people.
        write: Writes the plan to a new folder, and verifies it if the last argument says so.
    """
    from mot_megatron.conversion.folder import check_new

    for what, count in plan.left_out.items():
        print(f"left out: {count} tensors, {what}")
    check_new(options.destination, plan.num_bytes)
    print(description)
    if options.dry_run:
        print("nothing was written (--dry-run)")
        return 0
    manifest = write(plan, options.destination, options.verify)
    compared = ", compared with the source" if options.verify else ""
    print(f"{options.destination}: {len(manifest.files)} files{compared}")
    return 0
