"""Rehearse a training step as one rank of a world of any size, in one process on a CPU.

The project's own step runs: its model, its schedules, its ZeRO engine. PyTorch's fake process group
takes the place of the other ranks, and tensors with shapes but without values that of the
weights and activations. What the host reads from a tensor (norms, counts) has a fixed value, so
nothing may depend on it; routers are taken to give every expert as many rows.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from fractions import Fraction
from typing import Any
from unittest import mock

import deepspeed.runtime.zero.partition_parameters as ds_parameters
import deepspeed.runtime.zero.partitioned_param_coordinator as ds_coordinator
import deepspeed.runtime.zero.stage3 as ds_stage3
import deepspeed.runtime.zero.utils as ds_utils
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from mot_megatron.config import Config
from mot_megatron.model import model as model_module
from mot_megatron.model.attention_core import AttentionCore, build_attention_core
from mot_megatron.model.flops import step_flops
from mot_megatron.model.micro_batch import MicroBatch
from mot_megatron.model.pieces import pieces_of_stage
from mot_megatron.parallel.axes import axes_of
from mot_megatron.parallel.groups import ProcessGroups
from mot_megatron.planning.activations import DEVICES, activation_bytes
from mot_megatron.rules import check_world_size
from mot_megatron.scaling.balanced_routing import KnownCounts
from mot_megatron.scaling.ledger import Ledger, Tally, extend
from mot_megatron.scaling.recorder import LedgerRecorder
from mot_megatron.scaling.roles import with_micro_batches
from mot_megatron.scaling.synthetic import SyntheticBatches, build_groups
from mot_megatron.scaling.valueless import FAKE_BACKEND, with_values, without_values
from mot_megatron.train.session import Trainer, build_trainer
from mot_megatron.train.step import train_step

_GATHER = "_PartitionedParameterCoordinator__all_gather_params_"


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
        ConfigError: The configuration is illegal on so many ranks.
    """
    check_world_size(config, world_size)
    dist.init_process_group(FAKE_BACKEND, store=FakeStore(), rank=rank, world_size=world_size)
    return rehearse_in_fake_world(config, build_groups(config, shares, torch.device("cpu")), shares)


def rehearse_in_fake_world(
    config: Config, groups: ProcessGroups, shares: Sequence[float]
) -> Ledger:
    """Return the ledger of this rank, in a world that is fake already.

    Only as many micro-batches run as are needed to know what each further one adds.
    """
    micro_batches = config.accumulation_steps(groups.data_size)
    if groups.pipeline_size == 1:
        # With ZeRO-2 and 3, the first and the last are special, in other ways.
        if micro_batches <= 3:
            return run_in_fake_world(config, groups, shares)[0]
        ledger, further = run_in_fake_world(
            with_micro_batches(config, 3, groups.data_size), groups, shares
        )
        return extend(ledger, further, 1, micro_batches)
    # The interleaved schedule needs a multiple of the number of stages.
    interleaved = config.parallel.virtual_pipeline_model_parallel_size is not None
    few = groups.pipeline_size if interleaved else 1
    if micro_batches <= 2 * few:
        return run_in_fake_world(config, groups, shares)[0]
    less, more = (
        run_in_fake_world(with_micro_batches(config, count, groups.data_size), groups, shares)[0]
        for count in (few, 2 * few)
    )
    return extend(more, more.tally.plus(less.tally, -1), few, micro_batches)


def run_in_fake_world(
    config: Config, groups: ProcessGroups, shares: Sequence[float]
) -> tuple[Ledger, Tally]:
    """Run all micro-batches of one step; see ``record_step``."""
    # Batches have values, so that attention can read the lengths of documents.
    batches = SyntheticBatches(config, groups, shares)
    counts = KnownCounts()
    with in_shapes(), counts.patched():
        ledger, further = record_step(build_trainer(config, groups, batches), counts)
    saved = {
        device: activation_bytes(
            config, groups.pipeline_rank, batches.rows, ledger.micro_batches, device
        )
        for device in DEVICES
    }
    ledger.memory.peak_on_gpu = ledger.memory.peak - saved["cpu"] + saved["cuda"]
    flops = step_flops(config.model, batches.rows.towers, attended_pairs=0, labels=0).towers
    layers = sum(len(piece.layers) for piece in pieces_of_stage(config, groups.pipeline_rank))
    share = Fraction(layers, config.model.num_layers) / groups.tensor_size
    ledger.tower_flops = {
        name: int(share * tower) * ledger.micro_batches
        for name, tower in zip(config.model.tower_names, flops, strict=True)
    }
    return ledger, further


def record_step(trainer: Trainer, counts: KnownCounts | None = None) -> tuple[Ledger, Tally]:
    """Run a typical training step; return its ledger and ``LedgerRecorder.of_one_micro_batch``.

    Collective over the world. ``counts`` as for ``LedgerRecorder``.
    """
    axes = axes_of(trainer.groups, trainer.config.model.tower_names)
    if trainer.config.parallel.zero_stage == 3:
        # In its first step, it learns in which order it needs the weights. Fake tensors need a
        # recorder, which gives the values that the host reads.
        with LedgerRecorder(axes, trainer.progress_report, counts):
            train_step(trainer, step=1, learning_rate=0.0)
    with LedgerRecorder(axes, trainer.progress_report, counts) as recorder:
        train_step(trainer, step=2, learning_rate=0.0)
    micro_batches = trainer.config.accumulation_steps(trainer.groups.data_size)
    return recorder.ledger(micro_batches), recorder.of_one_micro_batch()


@contextlib.contextmanager
def in_shapes() -> Iterator[None]:
    """Give new tensors shapes alone, and keep libraries from needing values."""

    def attend_on_real_lengths(micro_batch: MicroBatch, _backend: str) -> AttentionCore:
        # The documents' lengths are values. On a CPU, only this core has a backward pass.
        with with_values():
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

    coordinator = ds_coordinator.PartitionedParameterCoordinator
    patches: list[AbstractContextManager[Any]] = [
        mock.patch.object(model_module, "build_attention_core", attend_on_real_lengths),
        mock.patch.object(dist, "all_gather_object", gather_own),
        mock.patch.object(ds_parameters.AllGatherCoalescedHandle, "wait", _wait_in_one_piece),
        mock.patch.object(coordinator, _GATHER, _with_one_slice(getattr(coordinator, _GATHER))),
        mock.patch.object(ds_stage3, "reduce_scatter_coalesced", _reduce_scatter_in_one_piece),
        mock.patch.object(ds_utils, "get_lst_from_rank0", broadcast_own),
        mock.patch.object(ds_utils, "assert_lst_len_same_as_other_ranks", broadcast_length),
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        # DeepSpeed looks at the addresses of tensors, which torch warns of.
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(without_values())
        yield


def _reduce_scatter_in_one_piece(
    tensors: Sequence[torch.Tensor], group: dist.ProcessGroup
) -> list[torch.Tensor]:
    """Do what DeepSpeed's ``reduce_scatter_coalesced`` does, without a slice per rank and tensor.

    The slices take most of the time of a rehearsal with hundreds of ranks. The bytes moved and
    sent are the same; only the order in the buffer differs.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    parts = [math.ceil(tensor.numel() / size) for tensor in tensors]
    flat = [tensor.view(-1) for tensor in tensors]
    padding = sum(parts) * size - sum(tensor.numel() for tensor in tensors)
    if len(flat) > 1 or padding:
        flat = [torch.cat([*flat, flat[0].new_empty(padding)])]
    flat[0].div_(size)
    own = flat[0].narrow(0, rank * sum(parts), sum(parts))
    dist.reduce_scatter_tensor(own, flat[0], group=group)
    held = [
        max(0, min(part, tensor.numel() - rank * part))
        for part, tensor in zip(parts, tensors, strict=True)
    ]
    starts = itertools.accumulate(parts, initial=0)
    return [own.narrow(0, start, count) for start, count in zip(starts, held, strict=False)]


def _with_one_slice(gather: Callable[..., Any]) -> Callable[..., Any]:
    """Make DeepSpeed's all-gathers take one slice of their buffer instead of one per rank.

    The slices have equal sizes, and tensors have no values by which they could differ.
    """
    narrow = torch.Tensor.narrow

    def gather_with_one_slice(*args: Any, **kwargs: Any) -> Any:
        previous: list[Any] = [None, None]

        def narrow_once(tensor: Any, dim: int, start: int, length: int) -> Any:
            if previous[0] != (id(tensor), dim, length):
                previous[:] = (id(tensor), dim, length), narrow(tensor, dim, start, length)
            return previous[1]

        with mock.patch.object(torch.Tensor, "narrow", narrow_once):
            return gather(*args, **kwargs)

    return gather_with_one_slice


def _wait_in_one_piece(handle: Any, handle_dependency: bool = True) -> None:
    """Do what DeepSpeed's ``AllGatherCoalescedHandle.wait`` does, without a slice per rank.

    The bytes copied are the same.
    """
    del handle_dependency
    if handle.complete:
        return
    assert not handle.use_secondary_tensor
    assert not handle.quantization
    handle.allgather_handle.wait()
    gathered = handle.partitions[0]._base
    for parameter in handle.params:
        whole = torch.cat([gathered.narrow(0, 0, parameter.ds_numel)])
        parameter.data = whole.view(parameter.ds_shape).to(parameter.ds_tensor.dtype)
        parameter.ds_status = ds_parameters.ZeroParamStatus.AVAILABLE
    handle.complete = True
