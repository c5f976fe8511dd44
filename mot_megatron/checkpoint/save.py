"""Saving: every rank writes its tensors to a temporary folder, which is then committed."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mot_megatron.checkpoint import agreement
from mot_megatron.checkpoint.agreement import on_every_rank, on_first_rank
from mot_megatron.checkpoint.commit import UnfinishedSave, documents_of
from mot_megatron.checkpoint.find import UNFINISHED_SUFFIX, CheckpointInfo, finished_checkpoints
from mot_megatron.checkpoint.manifest import FileRecord, record_of
from mot_megatron.checkpoint.storage import own_file_pattern, write_tensors
from mot_megatron.checkpoint.tensors import NamedTensor, describe
from mot_megatron.errors import CheckpointError

if TYPE_CHECKING:
    from mot_megatron.parallel.groups import ProcessGroups


def save_checkpoint(
    directory: Path,
    step: int,
    tensors: Sequence[NamedTensor],
    *,
    metadata: dict[str, Any],
    config_text: str,
    groups: ProcessGroups | None,
    keep: int,
    damaged: Collection[Path] = (),
) -> CheckpointInfo:
    """Save the tensors of all ranks as the checkpoint of ``step`` and delete old checkpoints.

    Every rank calls this. It uses collectives over the default group only; ``directory`` must be on
    a file system that all ranks share.

    Args:
        directory: Parent folder of the run's checkpoints, created if missing.
        step: Number of optimizer steps completed. An earlier save of the same step is replaced.
        tensors: This rank's parts; see NamedTensor.
        metadata: Everything else needed to resume, serializable as JSON. Rank 0's is stored.
        config_text: The resolved configuration as TOML. Rank 0's is stored.
        groups: The process groups; None for a single process without any.
        keep: Number of checkpoints to keep, including this one (at least 1). Older ones are deleted
            only after this one is complete; damaged ones are neither counted nor deleted.
        damaged: Checkpoints that failed verification although their manifest and sizes are good.

    Raises:
        CheckpointError: The checkpoint could not be written (for example, the disk is full or
            permission is denied); it is then removed, and older checkpoints are untouched. Or an
            older checkpoint could not be deleted. Raised on every rank.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}, must be at least 1")
    save = UnfinishedSave(directory, step)
    described = describe(tensors, groups)
    documents = documents_of(metadata, config_text)
    try:
        on_first_rank(save.begin)
        write_tensors(save.temporary, described)
        written = on_every_rank(lambda: (list(described), _records_of_own_files(save.temporary)))
        names = {name for own_names, _ in written for name in own_names}
        records = {name: record for _, own in written for name, record in own.items()}
        info = on_first_rank(lambda: save.complete(names, records, documents))
    except CheckpointError as error:
        # No rank is still writing: all ranks exchange outcomes at the end of every step above.
        on_first_rank(save.discard)
        raise CheckpointError(
            f"cannot save checkpoint {save.final}: {error}; older checkpoints are untouched"
        ) from error
    on_first_rank(lambda: _remove_old(save, keep, damaged))
    return info


def _records_of_own_files(directory: Path) -> dict[str, FileRecord]:
    own = directory.glob(own_file_pattern(agreement.rank()))
    return {path.name: record_of(path) for path in own}


def _remove_old(save: UnfinishedSave, keep: int, damaged: Collection[Path]) -> None:
    up_to_now = [
        path
        for step, path in finished_checkpoints(save.directory)
        if step <= save.step and (path == save.final or path not in damaged)
    ]
    for path in up_to_now[keep:]:
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
