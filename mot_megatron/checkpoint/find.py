"""Find the checkpoint to use: the newest one that passes verification.

A checkpoint directory contains one folder per saved step, such as ``step_00000100``. The folder of
a save that is still in progress or was killed ends in ``.tmp`` and is never used.
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
from mot_megatron.files import read_regular_file

METADATA_NAME = "metadata.json"
CONFIG_NAME = "config.toml"
UNFINISHED_SUFFIX = ".tmp"

REPLACED_SUFFIX = ".replaced" + UNFINISHED_SUFFIX
"""Of an older checkpoint of the same step, while a new one takes its name."""

_STEP_NAME = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint all of whose files were verified."""

    path: Path
    """Folder of the checkpoint."""
    step: int
    """Number of optimizer steps completed."""
    num_tensors: int
    """Number of global tensors, over all ranks."""
    num_bytes: int
    """Total size of all files except the manifest."""


@dataclass(frozen=True)
class Search:
    """The result of a search for a checkpoint."""

    checkpoint: CheckpointInfo | None
    """The checkpoint to use, or None if there is none."""
    skipped: tuple[str, ...]
    """One line per skipped folder, with the reason."""
    damaged: tuple[Path, ...] = ()
    """Checkpoints newer than the one to use that failed verification."""


@dataclass(frozen=True)
class _Listing:
    """Contents of a checkpoint directory, as seen by rank 0."""

    steps: tuple[tuple[int, Path], ...]
    """Steps and folders of checkpoints, newest first."""
    unfinished: tuple[Path, ...]
    """Folders of unfinished saves."""
    foreign: tuple[Path, ...]
    """Other folders, not written by this program."""


def step_name(step: int) -> str:
    """Return the folder name of the checkpoint of ``step``."""
    return f"step_{step:08d}"


def find_checkpoint(directory: Path, threads: int = 1) -> Search:
    """Find the newest checkpoint in ``directory`` that passes verification.

    Every rank calls this. Collectives over the default group: one broadcast of the directory
    listing, then one broadcast and one all-gather per checkpoint examined. Verification reads every
    file once, with the files divided among the ranks, and each rank's among ``threads``.

    Returns:
        The same result on every rank. A damaged checkpoint is skipped and raises no error.

    Raises:
        CheckpointError: ``directory`` exists but cannot be listed.
    """
    return _search(on_first_rank(lambda: _list(directory)), threads)


def resolve_resume(directory: Path) -> Search:
    """Find the checkpoint from which a run that saves to ``directory`` resumes.

    The result has no checkpoint only if ``directory`` contains none at all, so that a run never
    starts from scratch by mistake. Every rank calls this, with the same collectives as
    ``find_checkpoint``.

    Raises:
        CheckpointError: ``directory`` contains checkpoints or foreign folders, but no checkpoint
            passes verification; the message lists each with the reason. Or ``directory`` cannot be
            listed.
    """
    listing = on_first_rank(lambda: _list(directory))
    search = _search(listing)
    if search.checkpoint is None and (listing.steps or listing.foreign):
        raise CheckpointError(
            f"no checkpoint in {directory} can be used: {'; '.join(search.skipped)}. To start "
            "afresh, move this directory away or give the run another name"
        )
    return search


def open_checkpoint(path: Path, threads: int = 1) -> Search:
    """Open the checkpoint at a path given by the user.

    ``path`` is the folder of one checkpoint, or a checkpoint directory, of which the newest
    verified checkpoint is used. Every rank calls this, with collectives as in ``find_checkpoint``.

    Raises:
        CheckpointError: ``path`` contains no checkpoint, or none that passes verification.
    """
    if on_first_rank(lambda: (path / MANIFEST_NAME).is_file()):
        named = _STEP_NAME.fullmatch(path.resolve().name)
        checkpoint, problem = _verified(path, int(named[1]) if named else None, threads)
        if checkpoint is None:
            raise CheckpointError(f"checkpoint {path} cannot be used: {problem}")
        return Search(checkpoint, ())
    if not on_first_rank(path.is_dir):
        raise CheckpointError(f"{path}: no such checkpoint directory")
    search = find_checkpoint(path, threads)
    if search.checkpoint is None:
        reasons = "; ".join(search.skipped) or "it is empty"
        raise CheckpointError(f"{path} contains no usable checkpoint: {reasons}")
    return search


def read_metadata(checkpoint: CheckpointInfo) -> dict[str, Any]:
    """Return the ``metadata`` that was passed to ``save_checkpoint``."""
    path = checkpoint.path / METADATA_NAME
    try:
        metadata = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not legal JSON: {error}") from None
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path} contains a {type(metadata).__name__}, not an object")
    return metadata


def read_config_text(checkpoint: CheckpointInfo) -> str:
    """Return the resolved configuration of the run that saved the checkpoint, as TOML."""
    return _read_text(checkpoint.path / CONFIG_NAME)


def finished_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """List steps and folders of checkpoints with a valid manifest and file sizes, newest first.

    This is cheap, because it computes no hashes. It involves this process only, no collectives.
    """
    finished = []
    for step, path in _list(directory).steps:
        try:
            read_manifest(path)
        except CheckpointError:  # the next find_checkpoint reports it
            continue
        finished.append((step, path))
    return finished


def _list(directory: Path) -> _Listing:
    if not directory.exists():
        return _Listing((), (), ())
    steps, unfinished, foreign = [], [], []
    for path in sorted(directory.iterdir()):
        match = _STEP_NAME.fullmatch(path.name)
        replaced = _STEP_NAME.fullmatch(path.name.removesuffix(REPLACED_SUFFIX))
        if match:
            steps.append((int(match[1]), path))
        elif replaced and not path.with_name(replaced[0]).exists():
            # A save of the same step was killed just before it took the name.
            steps.append((int(replaced[1]), path))
        elif _STEP_NAME.match(path.name) and path.name.endswith(UNFINISHED_SUFFIX):
            unfinished.append(path)
        elif path.is_dir() and not path.name.startswith("."):
            foreign.append(path)
    return _Listing(tuple(sorted(steps, reverse=True)), tuple(unfinished), tuple(foreign))


def _search(listing: _Listing, threads: int = 1) -> Search:
    skipped = [f"{path}: an unfinished save" for path in listing.unfinished]
    skipped += [f"{path}: not a checkpoint of this program" for path in listing.foreign]
    damaged: list[Path] = []
    for step, path in listing.steps:
        checkpoint, problem = _verified(path, step, threads)
        if checkpoint is not None:
            return Search(checkpoint, tuple(skipped), tuple(damaged))
        skipped.append(f"{path}: {problem}")
        damaged.append(path)
    return Search(None, tuple(skipped), tuple(damaged))


def _verified(
    path: Path, step: int | None, threads: int
) -> tuple[CheckpointInfo | None, str | None]:
    """Verify the checkpoint at ``path``, which must be of ``step`` if given.

    Returns:
        The checkpoint and None, or None and the problem.
    """
    manifest = on_first_rank(lambda: _manifest_or_problem(path, step))
    if isinstance(manifest, str):
        return None, manifest
    problem = verify_files(path, manifest, threads)
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
        return read_regular_file(path).decode()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise CheckpointError(f"{path} is not UTF-8 text") from None
