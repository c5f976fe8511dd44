"""Saving: every rank writes its tensors to a temporary folder, which is then committed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from mot_megatron.checkpoint import agreement
from mot_megatron.checkpoint.agreement import on_every_rank, on_first_rank
from mot_megatron.checkpoint.commit import UnfinishedSave, documents_of
from mot_megatron.checkpoint.find import UNFINISHED_SUFFIX, CheckpointInfo, finished_checkpoints
from mot_megatron.checkpoint.manifest import FileRecord, record_of
from mot_megatron.checkpoint.storage import (
    Progress,
    check_written,
    own_file_pattern,
    write_tensors,
)
from mot_megatron.checkpoint.tensors import NamedTensor, describe
from mot_megatron.errors import CheckpointError

if TYPE_CHECKING:
    from mot_megatron.parallel.groups import ProcessGroups


@dataclass(frozen=True)
class Keep:
    """Which checkpoints remain after a save; the others are deleted once it is complete."""

    newest: int
    """Number of the newest complete checkpoints, including the new one; at least 1."""
    every_steps: int = 0
    """Those of multiples of this step remain for good; 0: none."""
    damaged: Collection[Path] = ()
    """Checkpoints that failed verification although their manifest and sizes are good. They are
    neither counted nor deleted, like all others that are damaged."""


@dataclass(frozen=True)
class Background:
    """What a save needs that runs in a thread beside training."""

    group: dist.ProcessGroup | None
    """Group of all ranks that nothing else uses meanwhile; None without a default group."""
    progress: Progress
    """Receives the number of bytes written, instead of a progress bar."""
    confirm: Callable[[], None] | None = None
    """See ``UnfinishedSave``; called on the first rank."""


def save_checkpoint(
    directory: Path,
    step: int,
    tensors: Sequence[NamedTensor],
    *,
    metadata: dict[str, Any],
    config_text: str,
    groups: ProcessGroups | None,
    keep: Keep | int,
    background: Background | None = None,
) -> CheckpointInfo:
    """Save the tensors of all ranks as the checkpoint of ``step`` and delete old checkpoints.

    Every rank calls this. Collectives are over the default group only, or that of ``background``;
    ``directory`` must be on a file system that all ranks share.

    Args:
        directory: Parent folder of the run's checkpoints, created if missing.
        step: Number of optimizer steps completed. An earlier save of the same step is replaced.
        tensors: This rank's parts, which must not change during the save; see NamedTensor.
        metadata: Everything else needed to resume, serializable as JSON. Rank 0's is stored.
        config_text: The resolved configuration as TOML. Rank 0's is stored.
        groups: The process groups; None for a single process without any.
        keep: Which checkpoints to keep; a number is that of the newest.
        background: Given if this runs in a thread beside training.

    Raises:
        CheckpointError: The checkpoint could not be written (for example, the disk is full or
            permission is denied); it is then removed, and older checkpoints are untouched. Or an
            older checkpoint could not be deleted. Raised on every rank.
    """
    keep = Keep(keep) if isinstance(keep, int) else keep
    if keep.newest < 1:
        raise ValueError(f"keep is {keep.newest}, must be at least 1")
    save = UnfinishedSave(directory, step, background.confirm if background else None)
    group = background and background.group
    described = describe(tensors, groups)
    documents = documents_of(metadata, config_text)
    try:
        on_first_rank(save.begin, group)
        names = write_tensors(save.temporary, described, group, background and background.progress)
        written = on_every_rank(lambda: _check_and_hash(save.temporary, described, names), group)
        records = {name: record for own in written for name, record in own.items()}
        info = on_first_rank(lambda: save.complete(names, records, documents), group)
    except CheckpointError as error:
        # No rank is still writing: all ranks exchange outcomes at the end of every step above.
        on_first_rank(save.discard, group)
        raise CheckpointError(
            f"cannot save checkpoint {save.final}: {error}; older checkpoints are untouched"
        ) from error
    on_first_rank(lambda: _remove_old(save, keep), group)
    return info


def _check_and_hash(
    directory: Path, own_names: Iterable[str], names: set[str]
) -> dict[str, FileRecord]:
    """Check that ``names``, of all ranks, include this rank's, and hash the files it has written.

    The names of all ranks together are too many to be exchanged.
    """
    check_written(own_names, names)
    own = directory.glob(own_file_pattern(agreement.rank()))
    return {path.name: record_of(path) for path in own}


def _remove_old(save: UnfinishedSave, keep: Keep) -> None:
    up_to_now = [
        (step, path)
        for step, path in finished_checkpoints(save.directory)
        if step <= save.step and (path == save.final or path not in keep.damaged)
    ]
    for step, path in up_to_now[keep.newest :]:
        if keep.every_steps and step % keep.every_steps == 0:
            continue
        # Rename it first, so that a kill during deletion does not leave a partial checkpoint.
        doomed = path.with_name(path.name + UNFINISHED_SUFFIX)
        try:
            path.rename(doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            reason = agreement.describe_os_error(error)
            raise CheckpointError(
                f"checkpoint {save.final} is complete, but the old {path} cannot be deleted: "
                f"{reason}"
            ) from error
