"""Read an output back and compare it with what was to be written."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from mot_megatron.conversion.tensors import OutputTensor, TensorInfo, TensorSource
from mot_megatron.errors import CheckpointError


def verify_outputs(outputs: Iterable[OutputTensor], written: TensorSource, where: str) -> int:
    """Produce every tensor again and compare it bit for bit; return the number of tensors.

    Args:
        outputs: What was to be written.
        written: What is in the files.
        where: Name of the files, for the error message.

    Raises:
        CheckpointError: A tensor is missing or differs, or the files have another one.
    """
    names = set()
    for output in outputs:
        names.add(output.name)
        if output.name not in written.infos:
            raise CheckpointError(f"{where}: it lacks {output.name}")
        found, expected = written.read(output.name), output.produce()
        same = TensorInfo(tuple(found.shape), found.dtype) == output.info
        if not same or not torch.equal(_bits(found), _bits(expected)):
            raise CheckpointError(f"{where}: {output.name} is not what was to be written")
    others = sorted(written.infos.keys() - names)
    if others:
        raise CheckpointError(f"{where}: it contains {others[0]}, which was not to be written")
    return len(names)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a tensor, so that NaNs are equal to themselves."""
    return tensor.contiguous().view(-1).view(torch.uint8)
