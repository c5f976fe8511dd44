"""Which checkpoint to take: the newest one that proves to be whole.

A directory of checkpoints holds one folder per saved step, ``step_00000100``. A save in progress,
or one that was killed, ends in ``.tmp`` and was never a checkpoint.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mot_megatron.checkpoint.agreement import on_first_rank
from mot_megatron.checkpoint.manifest import MANIFEST_NAME, Manifest, read_manifest, verify_files
from mot_megatron.errors import CheckpointError

METADATA_NAME = "metadata.json"
CONFIG_NAME = "config.toml"
UNFINISHED_SUFFIX = ".tmp"

_STEP_NAME = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint whose files were all verified."""

    path: Path
    step: int
    num_tensors: int
    num_bytes: int


@dataclass(frozen=True)
class Search:
    """What was found, and one line for each thing that was passed over, with the reason."""

    checkpoint: CheckpointInfo | None
    skipped: tuple[str, ...]


@dataclass(frozen=True)
class _Listing:
    """Contents of a directory of checkpoints, as rank 0 sees it."""

    steps: tuple[tuple[int, Path], ...]  # newest first
    unfinished: tuple[Path, ...]
    foreign: tuple[Path, ...]


def step_name(step: int) -> str:
    """Name of the folder of ``step``'s checkpoint."""
    return f"step_{step:08d}"


def find_checkpoint(directory: Path) -> Search:
    """The newest verified checkpoint in ``directory``, if there is one.

    Every rank calls this. Collectives over the default group: a broadcast of the listing, and for
    each checkpoint looked at one broadcast and one all-gather; the files are shared out over the
    ranks for verification. A single process reads them all.

    Returns:
        The same on every rank. Nothing is raised because of a bad checkpoint: it is skipped.

    Raises:
        CheckpointError: ``directory`` exists but cannot be listed.
    """
    return _search(on_first_rank(lambda: _list(directory)))


def resolve_resume(directory: Path) -> Search:
    """What a run whose checkpoints go to ``directory`` continues from.

    Never an occasion to start afresh by mistake: no checkpoint is returned only where there is
    none at all. Every rank calls this; collectives as in ``find_checkpoint``.

    Raises:
        CheckpointError: ``directory`` holds checkpoints, or folders that are none of ours, and not
            one can be verified; names each and the reason. Or it cannot be listed.
    """
    listing = on_first_rank(lambda: _list(directory))
    search = _search(listing)
    if search.checkpoint is None and (listing.steps or listing.foreign):
        raise CheckpointError(
            f"no checkpoint in {directory} can be used: {'; '.join(search.skipped)}. To start "
            "afresh, move this directory away or give the run another name"
        )
    return search


def open_checkpoint(path: Path) -> Search:
    """The checkpoint a user names: one step's folder, or a directory of them (the newest).

    Every rank calls this; collectives as in ``find_checkpoint``.

    Raises:
        CheckpointError: There is none at ``path``, or none that can be verified.
    """
    if on_first_rank(lambda: (path / MANIFEST_NAME).is_file()):
        checkpoint, problem = _verified(path)
        if checkpoint is None:
            raise CheckpointError(f"checkpoint {path} cannot be used: {problem}")
        return Search(checkpoint, ())
    if not on_first_rank(path.is_dir):
        raise CheckpointError(f"{path}: there is no such directory of checkpoints")
    search = find_checkpoint(path)
    if search.checkpoint is None:
        reasons = "; ".join(search.skipped) or "it is empty"
        raise CheckpointError(f"{path} holds no usable checkpoint: {reasons}")
    return search


def read_metadata(checkpoint: CheckpointInfo) -> dict[str, Any]:
    """What ``save_checkpoint`` was given as ``metadata``."""
    return json.loads(_read_text(checkpoint.path / METADATA_NAME))


def read_config_text(checkpoint: CheckpointInfo) -> str:
    """The resolved configuration of the run that saved the checkpoint, as TOML."""
    return _read_text(checkpoint.path / CONFIG_NAME)


def finished_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """Steps and folders in ``directory`` whose manifest and file sizes are right, newest first.

    Cheap: sums are not computed. This process only, no collectives.
    """
    finished = []
    for step, path in _list(directory).steps:
        try:
            read_manifest(path)
        except CheckpointError:  # the next find_checkpoint names it
            continue
        finished.append((step, path))
    return finished


def _list(directory: Path) -> _Listing:
    if not directory.exists():
        return _Listing((), (), ())
    steps, unfinished, foreign = [], [], []
    for path in sorted(directory.iterdir()):
        match = _STEP_NAME.fullmatch(path.name)
        if match:
            steps.append((int(match[1]), path))
        elif _STEP_NAME.match(path.name) and path.name.endswith(UNFINISHED_SUFFIX):
            unfinished.append(path)
        elif path.is_dir() and not path.name.startswith("."):
            foreign.append(path)
    return _Listing(tuple(sorted(steps, reverse=True)), tuple(unfinished), tuple(foreign))


def _search(listing: _Listing) -> Search:
    skipped = [f"{path}: an unfinished save" for path in listing.unfinished]
    skipped += [f"{path}: no checkpoint of this program" for path in listing.foreign]
    for step, path in listing.steps:
        checkpoint, problem = _verified(path, step)
        if checkpoint is not None:
            return Search(checkpoint, tuple(skipped))
        skipped.append(f"{path}: {problem}")
    return Search(None, tuple(skipped))


def _verified(path: Path, step: int | None = None) -> tuple[CheckpointInfo | None, str | None]:
    """Verify the checkpoint at ``path``, which must be of ``step`` if given: it, or the problem."""
    manifest = on_first_rank(lambda: _manifest_or_problem(path, step))
    if isinstance(manifest, str):
        return None, manifest
    problem = verify_files(path, manifest)
    if problem is not None:
        return None, problem
    return CheckpointInfo(path, manifest.step, manifest.num_tensors, manifest.num_bytes), None


def _manifest_or_problem(path: Path, step: int | None) -> Manifest | str:
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return str(error)
    if step is not None and manifest.step != step:
        return f"it is the checkpoint of step {manifest.step}"
    return manifest


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
