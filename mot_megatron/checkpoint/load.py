"""Loading of a checkpoint, written in any layout, into existing tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch.distributed.checkpoint.metadata import Metadata

from mot_megatron.checkpoint.agreement import on_every_rank
from mot_megatron.checkpoint.find import CheckpointInfo
from mot_megatron.checkpoint.storage import read_index, read_tensors, stored_tensors
from mot_megatron.checkpoint.tensors import NamedTensor, describe
from mot_megatron.errors import CheckpointError

if TYPE_CHECKING:
    from mot_megatron.parallel.groups import ProcessGroups

_NAMES_SHOWN = 3


def load_checkpoint(
    checkpoint: CheckpointInfo,
    tensors: Sequence[NamedTensor],
    groups: ProcessGroups | None,
    *,
    prefix: str = "",
    any_float: bool = False,
) -> None:
    """Load this rank's tensors in place from a verified checkpoint.

    Every rank calls this. Collectives: two all-gathers of objects over the default group. Each rank
    reads its own parts. If this raises an error, no tensor has changed, unless a file was damaged
    after verification.

    Args:
        checkpoint: Result of find_checkpoint, resolve_resume or open_checkpoint.
        tensors: This rank's parts of all tensors to load. Names, global shapes and dtypes must
            equal those in the checkpoint.
        groups: The process groups; None for a single process, which holds every tensor whole.
        prefix: Ignore tensors of the checkpoint whose names do not start with this. Every other
            tensor must be requested by at least one rank; with "", that is all of them.
        any_float: Convert floating-point values of another dtype instead of raising an error.

    Raises:
        CheckpointError: The checkpoint belongs to another model, is malicious or cannot be read.
            Raised on every rank.
    """
    described = describe(tensors, groups)
    try:
        names = on_every_rank(lambda: _compare(read_index(checkpoint.path), tensors, any_float))
        on_every_rank(lambda: _read(checkpoint, described, set().union(*names), prefix))
    except CheckpointError as error:
        raise CheckpointError(f"cannot load checkpoint {checkpoint.path}: {error}") from error


def read_whole_tensors(checkpoint: CheckpointInfo, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Read the named tensors of a verified checkpoint, each whole.

    This involves this process only, no collectives.

    Raises:
        CheckpointError: A tensor is missing, or the checkpoint cannot be read.
    """
    try:
        index = read_index(checkpoint.path)
        stored, wanted = stored_tensors(index), set(names)
        missing = sorted(wanted - stored.keys())
        if missing:
            raise _of_another_model(f"it lacks {_shorten(missing)}")
        tensors = {
            name: torch.empty(stored[name].size, dtype=stored[name].properties.dtype)
            for name in sorted(wanted)
        }
        read_tensors(checkpoint.path, index, tensors)
    except CheckpointError as error:
        raise CheckpointError(f"cannot load checkpoint {checkpoint.path}: {error}") from error
    return tensors


def _compare(index: Metadata, tensors: Sequence[NamedTensor], any_float: bool) -> set[str]:
    """Check this rank's tensors against the index and return their names."""
    stored = stored_tensors(index)
    missing = sorted(named.name for named in tensors if named.name not in stored)
    if missing:
        raise _of_another_model(f"it lacks {_shorten(missing)}")
    differing = [
        f"{named.name} is {kept} in the checkpoint and {wanted} in this model"
        for named in tensors
        if (kept := _kind(stored[named.name].size, stored[named.name].properties.dtype, any_float))
        != (wanted := _kind(named.sharding.global_shape, named.tensor.dtype, any_float))
    ]
    if differing:
        raise _of_another_model(_shorten(differing))
    return {named.name for named in tensors}


def _read(
    checkpoint: CheckpointInfo, described: dict[str, torch.Tensor], names: set[str], prefix: str
) -> None:
    index = read_index(checkpoint.path)
    stored = stored_tensors(index)
    unexpected = sorted(name for name in stored if name.startswith(prefix) and name not in names)
    if unexpected:
        raise _of_another_model(f"this model has no {_shorten(unexpected)}")
    read_tensors(checkpoint.path, index, described)


def _of_another_model(difference: str) -> CheckpointError:
    return CheckpointError(f"it is a checkpoint of another model: {difference}")


def _kind(shape: Sequence[int], dtype: torch.dtype, any_float: bool) -> str:
    kind = "float" if any_float and dtype.is_floating_point else str(dtype).removeprefix("torch.")
    return f"{list(shape)} {kind}"


def _shorten(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    rest = len(names) - _NAMES_SHOWN
    return f"{shown} and {rest} more" if rest > 0 else shown
