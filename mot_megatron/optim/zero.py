"""The training engine: a model under DeepSpeed's ZeRO, with gradients that are plain sums.

What DeepSpeed does on the side (dividing by ranks and by micro-batches, clipping, its norms, its
checkpoints) is undone or unused, so that every ZeRO stage computes the same thing: AdamW on the sum
of all gradients that backward was called for, clipped by the global norm. A rank may hold a part of
the model only: a shard of every matrix, some towers (see ``owners``), the layers of a pipeline
stage.

bf16 means bf16 weights and gradients in forward and backward, fp32 weights in the optimizer.
Gradients are summed over micro-batches and over ranks in fp32: a sum in bf16 loses small
micro-batches' gradients. For ZeRO-1 that makes DeepSpeed use its BF16_Optimizer, which keeps a
whole fp32 gradient on each rank; ZeRO-2 and 3 keep this rank's part.
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from mot_megatron.model.sharding import is_replica, tower_of
from mot_megatron.optim.adamw import GatedAdamW
from mot_megatron.optim.deepspeed_setup import (
    Topology,
    deepspeed_config,
    prepare_deepspeed,
    sums_gradients,
)
from mot_megatron.optim.norms import StepNorms, step_norms
from mot_megatron.optim.owners import OwnersModule, by_owners, has_owned_towers
from mot_megatron.optim.parameter_groups import parameter_groups
from mot_megatron.optim.partitions import MOMENTS, Flat, Partition, Replicated, Scattered
from mot_megatron.optim.settings import OptimizerSettings

if TYPE_CHECKING:
    from mot_megatron.parallel.groups import ProcessGroups


def _assert_legal(settings: OptimizerSettings, groups: ProcessGroups) -> None:
    """Assert what the configuration's rules promise about ZeRO and the layout."""
    stage = settings.zero_stage
    assert stage == 1 or groups.pipeline_size == 1, (stage, groups.pipeline_size)
    assert stage in (1, 2) or not has_owned_towers(groups), stage
    assert stage > 0 or (settings.offload, settings.precision) == ("none", "fp32"), settings


@dataclass(frozen=True)
class HeldTensors:
    """Tensors of one rank's model state; some may share memory."""

    weights: list[torch.Tensor]
    """What forward reads."""
    gradients: list[torch.Tensor]
    optimizer: list[torch.Tensor]
    """What AdamW steps, and its moments."""


class ZeroEngine:
    """Forward, backward and step of a model whose optimizer, at least, is sharded by ZeRO.

    Without a pipeline: ``forward`` and ``backward`` for every micro-batch, then ``step``. With one,
    its schedule runs the micro-batches; then ``reduce_gradients`` and ``step``.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: OptimizerSettings,
        groups: ProcessGroups,
        *,
        num_towers: int | None = None,
    ):
        """Take over ``model``, on its device; with ZeRO-3 its parameters are cut up in place.

        The model is this rank's part: of its pipeline stage, and with the towers it holds. Every
        parameter needs ``tower``, and ``tensor_model_parallel`` set to True where tensor
        parallelism splits it. Replicated parameters' gradients must be complete on every
        tensor-parallel rank. Of a parameter that the first and the last pipeline stage both hold,
        both need ``tied_across_stages`` set to True, and the last one's ``mark_replica``.

        Collective over the world: a parameter's values on the first of its owners (the ranks of
        its ``groups.reduction_group``) are sent to the others.

        Args:
            model: This rank's part.
            settings: The same on all ranks.
            groups: This rank's.
            num_towers: K of the whole model, over all ranks; may be left out where every rank
                holds every tower.
        """
        _assert_legal(settings, groups)
        prepare_deepspeed()
        self._model = model
        self._settings = settings
        self._groups = groups
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._num_towers = self._count_towers() if num_towers is None else num_towers
        self._micro_batches = 0
        self._reached: set[str] = set()
        for name, parameter in self._parameters.items():
            parameter.register_hook(functools.partial(self._mark_reached, name))
        owned = by_owners(self._parameters.values(), groups)
        self._adamw = GatedAdamW(
            parameter_groups(owned, settings.weight_decay),
            lr=0.0,  # given to every step
            betas=settings.betas,
            eps=settings.eps,
            fused=True,
        )
        module = OwnersModule(model, owned) if any(o.name for o in owned) else model
        config = deepspeed_config(settings, model, groups)
        with contextlib.redirect_stdout(
            io.StringIO()
        ):  # memory reports that cannot be switched off
            self._engine, optimizer, *_ = deepspeed.initialize(
                model=module, optimizer=self._adamw, config=config, mpu=Topology(groups)
            )
        # Pipelines run backward without telling DeepSpeed, which must not take it for the last.
        self._engine.set_gradient_accumulation_boundary(False)
        self._partition = self._make_partition(optimizer)
        for tensor in self._partition.optimized():
            self._adamw.make_state(tensor)
        self._partition.link()

    def _count_towers(self) -> int:
        assert max(self._groups.pipeline_size, self._groups.modality_size) == 1, (
            "num_towers is needed where ranks hold different parts of the model"
        )
        return 1 + max(tower_of(p) for p in self._parameters.values())

    def _mark_reached(self, name: str, _gradient: torch.Tensor) -> None:
        self._reached.add(name)

    def _make_partition(self, optimizer: Any) -> Partition:
        parameters = list(self._parameters.values())
        if self._settings.zero_stage == 0:
            return Replicated(parameters, self._adamw, self._groups.data_rank)
        if self._settings.zero_stage == 3:
            return Scattered(parameters, optimizer, self._groups.data_rank)
        flat = Flat(parameters, optimizer)
        if self._settings.zero_stage == 2 and has_owned_towers(self._groups):
            flat.reduce_at_once()
        return flat

    @property
    def model(self) -> nn.Module:
        """The model; call ``forward`` instead of it, which ZeRO-3 needs to gather weights."""
        return self._model

    def forward(self, *inputs: Any) -> Any:
        """The model's forward.

        To be followed by backward, it must return a tensor, or a tuple, list or dict of them:
        DeepSpeed does not find tensors in anything else, and its hooks would silently not run.
        """
        outputs = self._engine(*inputs)
        assert isinstance(outputs, torch.Tensor | tuple | list | dict), type(outputs)
        return outputs

    @property
    def loss_factor(self) -> int:
        """What ``backward`` multiplies its loss with: ZeRO-3 divides gradients by the ranks.

        So must whoever adds gradients of other losses inside the model.
        """
        return 1 if sums_gradients(self._settings) else self._groups.data_size

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of ``loss`` to those of the step.

        The gradient that the step uses is the plain sum over the micro-batches and the
        parameter's owners: the loss must be scaled already, for example as (local sum of token
        losses) / (tokens of the whole step). The last micro-batch of a step reduces over the
        owners; ZeRO-2 and 3 reduce in each.

        Raises:
            RuntimeError: A parameter got no gradient. All must take part, be it with zeros: ZeRO-3
                and offloading would silently use what they hold of the step before, and ranks that
                disagree would hang.
        """
        assert self._groups.pipeline_size == 1, "a pipeline runs backward itself"
        self._micro_batches += 1
        last = self._micro_batches == self._settings.gradient_accumulation_steps
        assert self._micro_batches <= self._settings.gradient_accumulation_steps
        self._engine.set_gradient_accumulation_boundary(last)
        # The product is needed even with 1: DeepSpeed divides by the micro-batches wherever
        # backward starts at a tensor that forward returned, whatever scale_wrt_gas says.
        self._reached.clear()
        self._engine.backward(loss * self.loss_factor, scale_wrt_gas=False)
        self._check_reached()

    def reduce_gradients(self) -> None:
        """Finish the gradients of a step whose micro-batches a pipeline schedule has run.

        The schedule calls the model itself, not ``forward``, and autograd, not ``backward``, for
        all micro-batches of a step, with losses scaled as for ``backward``. Then this, then
        ``step``. Collective over ``groups.embedding``, on stages with tied parameters, then over
        the parameters' owners.

        Raises:
            RuntimeError: A parameter got no gradient in any micro-batch.
        """
        assert self._groups.pipeline_size > 1, "without a pipeline, backward does this"
        assert isinstance(self._partition, Flat)
        self._check_reached()
        self._reached.clear()
        for parameter in self._parameters.values():
            if getattr(parameter, "tied_across_stages", False):
                gradient = self._partition.unreduced(parameter)
                dist.all_reduce(gradient, group=self._groups.embedding)
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.allreduce_gradients()
        self._micro_batches = self._settings.gradient_accumulation_steps

    def _check_reached(self) -> None:
        if len(self._reached) < len(self._parameters):
            missing = sorted(self._parameters.keys() - self._reached)
            raise RuntimeError(f"no gradient reached {len(missing)} parameters: {missing[:5]}")

    def step(self, learning_rate: float) -> StepNorms:
        """Clip, step, forget the gradients; return the norms from before the clipping.

        With a NaN or infinite gradient anywhere no rank changes a weight or any optimizer state,
        and the result's ``finite`` is False, on all ranks. Collective over the world.
        """
        assert self._micro_batches == self._settings.gradient_accumulation_steps
        self._micro_batches = 0
        if self._groups.device.type == "cuda" and self._settings.offload == "optimizer":
            torch.cuda.synchronize()  # gradients are on their way to the host
        norms = step_norms(self._counted_gradients(), self._num_towers, self._groups.device)
        self._adamw.open = norms.finite
        self._adamw.gradient_scale = self._clip_coefficient(norms.total) if norms.finite else 1.0
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        self._engine.set_gradient_accumulation_boundary(False)
        return norms

    def _counted_gradients(self) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
        """Each element of the model's gradient on one rank of the world.

        Of a parameter that all tensor-parallel ranks hold alike, the first rank's counts; of one
        that two pipeline stages hold, the original. The partition sees to data parallelism.
        """
        first = self._groups.tensor_rank == 0
        for parameter, gradient in self._partition.gradients():
            split = getattr(parameter, "tensor_model_parallel", False)
            if (first or split) and not is_replica(parameter):
                yield parameter, gradient

    def _clip_coefficient(self, norm: float) -> float:
        """As ``torch.nn.utils.clip_grad_norm_``."""
        if self._settings.clip_grad == 0:
            return 1.0
        return min(1.0, self._settings.clip_grad / (norm + 1e-6))

    def held_tensors(self) -> HeldTensors:
        """This rank's model state as it lies in memory now; no collective."""
        # ZeRO-3 keeps a piece beside a parameter, whose own data is there while it is gathered.
        pieces = [getattr(p, "ds_tensor", None) for p in self._parameters.values()]
        optimized = self._partition.optimized()
        states = [self._adamw.state[tensor][key] for tensor in optimized for key in MOMENTS]
        return HeldTensors(
            weights=[p.data for p in self._parameters.values()]
            + [piece for piece in pieces if piece is not None],
            gradients=list(self._partition.gradient_tensors()),
            optimizer=optimized + states,
        )

    @property
    def optimizer_steps(self) -> int:
        """AdamW's step counter: steps taken since the start, over all resumptions."""
        return int(self._adamw.state[self._partition.optimized()[0]]["step"])

    def export_state(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """Yield (parameter name, state) one by one, in the model's order.

        These are the parameters that this rank holds, copies of another pipeline stage's included.
        The state holds this tensor-parallel rank's whole fp32 "weight", "exp_avg" and
        "exp_avg_sq", as new tensors on the device, equal on all owners whatever the ZeRO stage.

        Every parameter costs collectives over its owners: all data-parallel ranks must exhaust the
        iterator. They may hold different towers; as all take the model's order, none can wait for
        a rank that waits for it.
        """
        for name, parameter in self._parameters.items():
            yield name, self._partition.read(parameter)

    def import_state(
        self, state: Mapping[str, Mapping[str, torch.Tensor]], optimizer_steps: int
    ) -> None:
        """Continue from what ``export_state`` gave, in any layout that cuts tensors alike.

        ``state`` is looked up once for each parameter that this rank holds, in the model's order,
        so it may load lazily. Collective over the owners of each.
        """
        for name, parameter in self._parameters.items():
            self._partition.write(parameter, dict(state[name]))
        for tensor in self._partition.optimized():
            self._adamw.state[tensor]["step"].fill_(optimizer_steps)
        self._partition.publish()
