"""The training engine: a model under DeepSpeed ZeRO, with gradients that are plain sums.

All ZeRO stages compute the same: AdamW on the sum of the gradients of all backward passes, clipped
by the global norm. To that end, this engine reverts or does not use what DeepSpeed does in
addition: division by ranks and micro-batches, clipping, norms and checkpoints. A rank may hold only
part of the model: a shard of every matrix, some towers (see ``owners``) and the layers of one
pipeline stage.

With bf16, weights and gradients are bf16 in forward and backward, and the optimizer keeps fp32
weights. Gradients are summed in fp32, over micro-batches and over ranks, because a bf16 sum loses
the small gradients of single micro-batches. With ZeRO-1, DeepSpeed then uses its BF16_Optimizer,
which keeps a full fp32 gradient on every rank, and ``BucketReduction`` reduces it under backward;
ZeRO-2 and ZeRO-3 keep this rank's part.
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from mot_megatron.model.sharding import is_replica, tower_of
from mot_megatron.optim import frozen
from mot_megatron.optim.adamw import GatedAdamW
from mot_megatron.optim.deepspeed_setup import (
    Topology,
    deepspeed_config,
    prepare_deepspeed,
    sums_gradients,
)
from mot_megatron.optim.norms import StepNorms, step_norms
from mot_megatron.optim.owners import OwnersModule, by_owners, has_owned_towers, register_owners
from mot_megatron.optim.parameter_groups import parameter_groups
from mot_megatron.optim.partitions import (
    MOMENTS,
    WEIGHT,
    Flat,
    Partition,
    Piece,
    Replicated,
    Scattered,
)
from mot_megatron.optim.reduction import BucketReduction, is_tied
from mot_megatron.optim.settings import OptimizerSettings

if TYPE_CHECKING:
    from mot_megatron.parallel.groups import ProcessGroups


def _assert_legal(settings: OptimizerSettings, groups: ProcessGroups) -> None:
    """Assert that ZeRO and the layout go together, as the configuration rules guarantee."""
    stage = settings.zero_stage
    assert stage == 1 or groups.pipeline_size == 1, (stage, groups.pipeline_size)
    assert stage in (1, 2) or not has_owned_towers(groups), stage
    assert stage > 0 or (settings.offload, settings.precision) == ("none", "fp32"), settings


@dataclass(frozen=True)
class HeldTensors:
    """Tensors of one rank's model state; some may share memory."""

    weights: list[torch.Tensor]
    """Weights as forward reads them."""
    gradients: list[torch.Tensor]
    """Gradients, full or sharded."""
    optimizer: list[torch.Tensor]
    """The tensors that AdamW updates, and its moments."""


class ZeroEngine:
    """Forward, backward and optimizer step of a model under DeepSpeed ZeRO.

    Without pipeline parallelism, call ``forward`` and ``backward`` for every micro-batch, then
    ``step``. With it, the pipeline schedule runs all micro-batches; then call ``reduce_gradients``
    and ``step``.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: OptimizerSettings,
        groups: ProcessGroups,
        *,
        num_towers: int | None = None,
    ):
        """Wrap ``model``, which must be on its device; ZeRO-3 shards its parameters in place.

        Parameters that do not require gradients are frozen: forward reads them, and nothing else
        happens to them. Every parameter needs the attribute ``tower``; if tensor parallelism splits
        it, also ``tensor_model_parallel = True``. Gradients of parameters that are not split must
        be complete on every tensor-parallel rank. A parameter held by both the first and the last
        pipeline stage needs ``tied_across_stages = True`` on both and ``mark_replica`` on the last.

        Collective over the world: the first owner of each parameter (the first rank of its
        ``groups.reduction_group``) broadcasts its values to the other owners.

        Args:
            model: This rank's part of the model: its pipeline stage, with the towers it holds.
            settings: Settings of the optimizer, the same on all ranks.
            groups: Process groups of this rank.
            num_towers: K of the whole model, over all ranks; optional if every rank holds every
                tower.
        """
        _assert_legal(settings, groups)
        prepare_deepspeed()
        self._model = model
        self._settings = settings
        self._groups = groups
        self._all = dict(model.named_parameters())
        self._parameters = {n: p for n, p in self._all.items() if p.requires_grad}
        assert self._parameters, "every rank must have something to train"
        self._num_towers = self._count_towers() if num_towers is None else num_towers
        self._micro_batches = 0
        self._reached: set[str] = set()
        for name, parameter in self._parameters.items():
            parameter.register_hook(functools.partial(self._mark_reached, name))
        owned = by_owners(self._all.values(), groups)
        trained = by_owners(self._parameters.values(), groups)
        self._adamw = GatedAdamW(
            parameter_groups(
                trained,
                settings.weight_decay,
                settings.elements_reduced_together,
                settings.lr_mults,
            ),
            lr=0.0,  # set in every step
            betas=settings.betas,
            eps=settings.eps,
            fused=True,
        )
        register_owners(owned)
        module = OwnersModule(model) if any(o.name for o in trained) else model
        config = deepspeed_config(settings, model, groups)
        with contextlib.redirect_stdout(io.StringIO()):  # no setting disables its memory reports
            self._engine, optimizer, *_ = deepspeed.initialize(
                model=module, optimizer=self._adamw, config=config, mpu=Topology(groups)
            )
        # A pipeline schedule runs backward without DeepSpeed's knowledge. DeepSpeed must not treat
        # it as the last micro-batch.
        self._engine.set_gradient_accumulation_boundary(False)
        self._partition = self._make_partition(optimizer)
        for tensor in self._partition.optimized():
            self._adamw.make_state(tensor)
        self._partition.link()

    def _count_towers(self) -> int:
        assert max(self._groups.pipeline_size, self._groups.modality_size) == 1, (
            "num_towers is required if ranks hold different parts of the model"
        )
        return 1 + max(tower_of(p) for p in self._all.values())

    def _mark_reached(self, name: str, _gradient: torch.Tensor) -> None:
        self._reached.add(name)

    def _make_partition(self, optimizer: Any) -> Partition:
        parameters = list(self._parameters.values())
        if self._settings.zero_stage == 0:
            return Replicated(parameters, self._adamw, self._groups.data_rank)
        if self._settings.zero_stage == 3:
            return Scattered(parameters, optimizer, self._groups.data_rank)
        if self._settings.elements_reduced_together is not None:
            steps = self._settings.gradient_accumulation_steps
            BucketReduction(self._engine, optimizer, parameters, steps)
        flat = Flat(parameters, optimizer)
        if self._settings.zero_stage == 2 and has_owned_towers(self._groups):
            flat.reduce_at_once()
        return flat

    @property
    def model(self) -> nn.Module:
        """The model. Call ``forward`` of the engine instead, because ZeRO-3 must gather weights."""
        return self._model

    def forward(self, *inputs: Any) -> Any:
        """Run the forward pass of the model.

        The model must return a tensor, or a tuple, list or dict of tensors. DeepSpeed finds tensors
        in nothing else, and its backward hooks would silently not run.
        """
        outputs = self._engine(*inputs)
        assert isinstance(outputs, torch.Tensor | tuple | list | dict), type(outputs)
        return outputs

    @property
    def loss_factor(self) -> int:
        """The factor on the loss in ``backward``, because ZeRO-3 averages gradients over ranks.

        Code that adds gradients of other losses inside the model must apply the same factor.
        """
        return 1 if sums_gradients(self._settings) else self._groups.data_size

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of ``loss`` to those of the current step.

        The step uses the plain sum of gradients over micro-batches and the parameter's owners.
        Therefore the loss must already be scaled, for example as (local sum of token losses) /
        (tokens of the whole step). Gradients are reduced over the owners in the last micro-batch of
        a step; with ZeRO-2 and ZeRO-3, in every micro-batch.

        Raises:
            RuntimeError: A parameter received no gradient. Every parameter must receive one, even
                if it is zero. Otherwise ZeRO-3 and offloading would silently use gradients of the
                previous step, and ranks that differ would deadlock.
        """
        assert self._groups.pipeline_size == 1, "with a pipeline, its schedule runs backward"
        self._micro_batches += 1
        last = self._micro_batches == self._settings.gradient_accumulation_steps
        assert self._micro_batches <= self._settings.gradient_accumulation_steps
        self._engine.set_gradient_accumulation_boundary(last)
        # Multiply even by 1: if backward starts at a tensor that forward returned, DeepSpeed
        # divides by the number of micro-batches regardless of scale_wrt_gas.
        self._reached.clear()
        self._engine.backward(loss * self.loss_factor, scale_wrt_gas=False)
        self._check_reached()

    def reduce_gradients(self) -> None:
        """Reduce the gradients of a step whose micro-batches a pipeline schedule has run.

        For all micro-batches of a step, the schedule calls the model and autograd directly instead
        of ``forward`` and ``backward``, with losses scaled as for ``backward``. Call this
        afterwards, then ``step``. Collective over ``groups.embedding`` on stages with tied
        parameters, then over the parameters' owners.

        Raises:
            RuntimeError: A parameter received no gradient in any micro-batch.
        """
        assert self._groups.pipeline_size > 1, "without a pipeline, backward reduces gradients"
        assert isinstance(self._partition, Flat)
        self._check_reached()
        self._reached.clear()
        for parameter in self._parameters.values():
            if is_tied(parameter):
                gradient = self._partition.unreduced(parameter)
                dist.all_reduce(gradient, group=self._groups.embedding)
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.allreduce_gradients()
        self._micro_batches = self._settings.gradient_accumulation_steps

    def _check_reached(self) -> None:
        if len(self._reached) < len(self._parameters):
            missing = sorted(self._parameters.keys() - self._reached)
            raise RuntimeError(f"no gradient reached {len(missing)} parameters: {missing[:5]}")

    def step(
        self, learning_rate: float, accept: Callable[[StepNorms], bool] | None = None
    ) -> StepNorms:
        """Clip gradients, update the weights and clear the gradients; return norms before clipping.

        If any gradient on any rank is NaN or infinite, no rank changes weights or optimizer state,
        and ``finite`` of the result is False on all ranks. Collective over the world.

        Args:
            learning_rate: Learning rate of this step, which each tower's factor multiplies.
            accept: Receives the norms; if it returns False, on all ranks, neither weights nor
                optimizer state change. None: accept every step.
        """
        assert self._micro_batches == self._settings.gradient_accumulation_steps
        self._micro_batches = 0
        if self._groups.device.type == "cuda" and self._settings.offload == "optimizer":
            torch.cuda.synchronize()  # gradients are being copied to the host
        norms = step_norms(self._counted_gradients(), self._num_towers, self._groups.device)
        accepted = accept is None or accept(norms)
        self._adamw.open = norms.finite and accepted
        self._adamw.gradient_scale = self._clip_coefficient(norms.total) if norms.finite else 1.0
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate * group["lr_mult"]
        self._engine.step()
        self._engine.set_gradient_accumulation_boundary(False)
        return norms

    def _counted_gradients(self) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
        """Yield gradients so that every element of the model occurs on one rank of the world.

        A parameter that tensor parallelism does not split counts on the first tensor-parallel rank.
        One that two pipeline stages hold counts where it is not a replica. The partition handles
        data parallelism.
        """
        first = self._groups.tensor_rank == 0
        for parameter, gradient in self._partition.gradients():
            split = getattr(parameter, "tensor_model_parallel", False)
            if (first or split) and not is_replica(parameter):
                yield parameter, gradient

    def _clip_coefficient(self, norm: float) -> float:
        """Return the factor on gradients, as in ``torch.nn.utils.clip_grad_norm_``."""
        if self._settings.clip_grad == 0:
            return 1.0
        return min(1.0, self._settings.clip_grad / (norm + 1e-6))

    def held_tensors(self) -> HeldTensors:
        """Return the tensors of this rank's model state as stored now; no collective."""
        # With ZeRO-3, a parameter also has a piece; its own data exists only while gathered.
        pieces = [getattr(p, "ds_tensor", None) for p in self._parameters.values()]
        optimized = self._partition.optimized()
        states = [self._adamw.state[tensor][key] for tensor in optimized for key in MOMENTS]
        return HeldTensors(
            weights=[p.data for p in self._parameters.values()]
            + [piece for piece in pieces if piece is not None]
            + [tensor for _, p in self._frozen() for tensor in frozen.held(p)],
            gradients=list(self._partition.gradient_tensors()),
            optimizer=optimized + states,
        )

    def _frozen(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters that are not trained."""
        return ((name, p) for name, p in self._all.items() if name not in self._parameters)

    @property
    def optimizer_steps(self) -> int:
        """Step counter of AdamW: steps since the start of training, including before a resume."""
        return int(self._adamw.state[self._partition.optimized()[0]]["step"])

    def export_state(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """Yield the name and state of every parameter on this rank, in the model's order.

        Replicas of another pipeline stage's parameters are included. A state has the full fp32
        "weight", "exp_avg" and "exp_avg_sq" of this tensor-parallel rank, as new tensors on the
        device; a frozen parameter has only the weight. They are equal on all owners, for every ZeRO
        stage.

        Every parameter needs collectives over its owners, so all data-parallel ranks must exhaust
        the iterator. Ranks may hold different towers: all follow the model's order, which rules out
        deadlocks.
        """
        for name, parameter in self._all.items():
            trained = name in self._parameters
            yield name, self._partition.read(parameter) if trained else frozen.read(parameter)

    def pieces(self) -> Iterator[tuple[str, Piece]]:
        """Yield the name and this rank's piece of every parameter here, in the model's order.

        No copies and no collectives. The pieces of a parameter's owners are its ``export_state``,
        on any device if the optimizer is offloaded, and in the precision of forward if it is
        frozen.
        """
        for name, parameter in self._all.items():
            if name in self._parameters:
                yield name, self._partition.piece(parameter)
            else:
                yield name, frozen.piece(parameter, self._groups.data_rank)

    def import_state(
        self, state: Mapping[str, Mapping[str, torch.Tensor]], optimizer_steps: int
    ) -> None:
        """Load what ``export_state`` yielded in any layout with the same local shapes.

        ``state`` is read once per parameter on this rank, in the model's order, so it may load
        lazily. Collective over the owners of each parameter.

        Args:
            state: State by parameter name, as from ``export_state``.
            optimizer_steps: Number of optimizer steps completed.
        """
        for name, parameter in self._all.items():
            values = dict(state[name])
            if name in self._parameters:
                self._partition.write(parameter, values)
            else:
                frozen.write(parameter, values[WEIGHT], self._groups.data_rank)
        for tensor in self._partition.optimized():
            self._adamw.state[tensor]["step"].fill_(optimizer_steps)
        self._partition.publish()
