"""Loading of a checkpoint, written in any layout, into existing tensors."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
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
    unused: Collection[str] = (),
    any_float: bool = False,
) -> None:
    """Load this rank's tensors in place from a verified checkpoint.

    Every rank calls this. Collectives over the default group: two all-gathers of outcomes, and an
    all-reduce of one byte per tensor of the checkpoint. Each rank reads its own parts. If this
    raises an error, no tensor has changed, unless a file was damaged after verification.

    Args:
        checkpoint: Result of find_checkpoint, resolve_resume or open_checkpoint.
        tensors: This rank's parts of all tensors to load. Names, global shapes and dtypes must
            equal those in the checkpoint.
        groups: The process groups; None for a single process, which holds every tensor whole.
        prefix: Ignore tensors of the checkpoint whose names do not start with this. Every other
            tensor must be requested by at least one rank; with "", that is all of them.
        unused: Names that the checkpoint may have although no rank loads them.
        any_float: Convert floating-point values of another dtype instead of raising an error.

    Raises:
        CheckpointError: The checkpoint belongs to another model, is malicious or cannot be read.
            Raised on every rank.
    """
    described = describe(tensors, groups)
    indices: list[Metadata] = []  # not the result of on_every_rank, which gathers results

    def read_and_compare() -> None:
        indices.append(read_index(checkpoint.path))
        _compare(indices[0], tensors, any_float)

    try:
        on_every_rank(read_and_compare)
        (index,) = indices
        unrequested = _unrequested(index, {*described, *unused}, prefix, groups)
        if unrequested:
            raise _of_another_model(f"this model has no {_shorten(unrequested)}")
        on_every_rank(lambda: read_tensors(checkpoint.path, index, described))
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


def _compare(index: Metadata, tensors: Sequence[NamedTensor], any_float: bool) -> None:
    """Check this rank's tensors against the index."""
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


def _unrequested(
    index: Metadata, own_names: Collection[str], prefix: str, groups: ProcessGroups | None
) -> list[str]:
    """Return the tensors with ``prefix`` that no rank requests; the same on every rank.

    The index, which is the same on every rank, numbers the names, so that ranks do not have to
    exchange them.
    """
    names = sorted(name for name in stored_tensors(index) if name.startswith(prefix))
    device = torch.device("cpu") if groups is None else groups.device
    own = [name in own_names for name in names]
    requested = torch.tensor(own, dtype=torch.uint8, device=device)
    if dist.is_initialized():
        dist.all_reduce(requested, op=dist.ReduceOp.MAX)
    return [name for name, wanted in zip(names, requested.tolist(), strict=True) if not wanted]


def _of_another_model(difference: str) -> CheckpointError:
    return CheckpointError(f"it is a checkpoint of another model: {difference}")


def _kind(shape: Sequence[int], dtype: torch.dtype, any_float: bool) -> str:
    kind = "float" if any_float and dtype.is_floating_point else str(dtype).removeprefix("torch.")
    return f"{list(shape)} {kind}"


def _shorten(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    rest = len(names) - _NAMES_SHOWN
    return f"{shown} and {rest} more" if rest > 0 else shown
