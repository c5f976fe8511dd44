"""Rehearse a training step as one rank of a world of any size, in one process on a CPU.

The project's own step runs: its model, its schedules, its ZeRO engine. PyTorch's fake process group
takes the place of the other ranks, and fake tensors, which have shapes but no values, that of the
weights and activations. What the host reads from a tensor (norms, counts) has a fixed value, so
nothing may depend on it; experts, which send rows where the router says, cannot be rehearsed.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import deepspeed.runtime.zero.utils as ds_utils
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore

from mot_megatron.config import Config
from mot_megatron.model import model as model_module
from mot_megatron.model.attention_core import AttentionCore, build_attention_core
from mot_megatron.model.micro_batch import MicroBatch
from mot_megatron.parallel.groups import ProcessGroups
from mot_megatron.planning.placing import place_towers, tokens_of_towers
from mot_megatron.scaling.ledger import Ledger, LedgerRecorder, axes_of, value_read_by_host
from mot_megatron.scaling.roles import check_can_be_rehearsed
from mot_megatron.scaling.synthetic import SyntheticBatches, tokens_of
from mot_megatron.train.session import Trainer, build_placed_groups, build_trainer
from mot_megatron.train.step import train_step

CPU = torch.device("cpu")


def rehearse(config: Config, world_size: int, rank: int, shares: Sequence[float]) -> Ledger:
    """Return the ledger of one training step of one rank. Use a new process for every call.

    DeepSpeed reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, which the process
    must have; the port is never used.

    Args:
        config: Resolved configuration.
        world_size: Number of ranks.
        rank: The rank to rehearse.
        shares: Share of the tokens of each modality, M of them, with the sum 1.

    Raises:
        ConfigError: As ``check_can_be_rehearsed``.
    """
    check_can_be_rehearsed(config, world_size)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    return rehearse_in_fake_world(config, shares)


def rehearse_in_fake_world(config: Config, shares: Sequence[float]) -> Ledger:
    """Return the ledger of this rank, in a world that is fake already."""
    groups = build_groups(config, shares)
    # Batches have values, so that attention can read the lengths of documents.
    batches = SyntheticBatches(config, groups, shares)
    with fake_values():
        return record_step(build_trainer(config, groups, batches))


def build_groups(config: Config, shares: Sequence[float]) -> ProcessGroups:
    """Build the process groups of a configuration for synthetic batches. Collective."""
    counts = tokens_of(shares, config.data.seq_length)
    tokens = dict(zip(config.model.modalities, counts, strict=True))
    placement = place_towers(config, tokens_of_towers(config.model, tokens))
    return build_placed_groups(config, placement, CPU)


def record_step(trainer: Trainer) -> Ledger:
    """Run one training step and return its ledger. Collective over the world."""
    axes = axes_of(trainer.groups, trainer.config.model.tower_names)
    with LedgerRecorder(axes, trainer.progress_report) as recorder:
        train_step(trainer, step=1, learning_rate=0.0)
    return recorder.ledger


@contextlib.contextmanager
def fake_values() -> Iterator[None]:
    """Make all new tensors fake, and keep libraries from needing their values."""

    def convert_in_place(module: nn.Module, convert: Callable[[Any], Any], *_: Any) -> nn.Module:
        # torch cannot swap the fake tensor of a parameter that others refer to.
        for parameter in module.parameters():
            parameter.data = convert(parameter.data)
        return module

    def attend_on_real_lengths(micro_batch: MicroBatch, _backend: str) -> AttentionCore:
        # The documents' lengths are values. On a CPU, only this core has a backward pass.
        with unset_fake_temporarily():
            return build_attention_core(micro_batch, "sdpa")

    def gather_own(gathered: list[Any], own: Any, group: Any = None) -> None:
        del group
        gathered[:] = [own] * len(gathered)

    def broadcast_own(values: list[int]) -> list[int]:
        # DeepSpeed checks with these that ranks agree, which reads what rank 0 has broadcast.
        dist.broadcast(torch.tensor(values), src=0)
        return values

    def broadcast_length(values: list[int]) -> None:
        dist.broadcast(torch.tensor(len(values)), src=0)

    patches: list[AbstractContextManager[Any]] = [
        mock.patch.object(nn.Module, "_apply", convert_in_place),
        mock.patch.object(model_module, "build_attention_core", attend_on_real_lengths),
        mock.patch.object(dist, "all_gather_object", gather_own),
        mock.patch.object(FakeTensor, "tolist", _values_of),
        mock.patch.object(ds_utils, "get_lst_from_rank0", broadcast_own),
        mock.patch.object(ds_utils, "assert_lst_len_same_as_other_ranks", broadcast_length),
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        # DeepSpeed looks at the addresses of tensors, which torch warns of.
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


def _values_of(tensor: torch.Tensor) -> Any:
    """Return what the host reads from a fake tensor of one or more dimensions."""
    if tensor.ndim > 1:
        return [_values_of(row) for row in tensor]
    return [value_read_by_host(tensor.dtype)] * tensor.numel()
