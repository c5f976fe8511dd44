"""Where each ZeRO stage keeps gradients, fp32 weights and AdamW state: one face for all stages.

This file alone reaches into DeepSpeed's optimizers. "Full" means all that a tensor-parallel rank
holds of a parameter, "local" this rank's part of that under ZeRO, which divides it among the
parameter's owners: the data-parallel ranks, or those that hold its tower.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_grad,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import nn

from mot_megatron.optim.adamw import GatedAdamW

WEIGHT = "weight"
"""Name of the fp32 weight beside AdamW's state."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state per element, by torch's names."""
_SUMS = ("_hp_grad", "grad_accum", "grad")
"""Attributes of a parameter in which micro-batches' gradients may be summed: by DeepSpeed's bf16
optimizer, by its other one, by torch."""


class Partition(Protocol):
    """One ZeRO stage's layout."""

    def optimized(self) -> list[torch.Tensor]:
        """The fp32 tensors on this rank that AdamW steps."""
        ...

    def link(self) -> None:
        """Make AdamW's state, which exists by now, readable by parameter."""
        ...

    def gradients(self) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
        """Local gradients, between the last backward and the step.

        Over a parameter's owners each element appears exactly once; padding is zero.
        """
        ...

    def gradient_tensors(self) -> Iterator[torch.Tensor]:
        """Whatever holds gradients now, at any time between steps; some may share memory."""
        ...

    def read(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        """Full fp32 weight and moments. Collective over the parameter's owners."""
        ...

    def write(self, parameter: nn.Parameter, values: dict[str, torch.Tensor]) -> None:
        """Set fp32 weight and moments from full tensors, equal on all owners."""
        ...

    def publish(self) -> None:
        """Bring the weights of forward up to date with the fp32 ones. Collective."""
        ...


class Replicated:
    """Stage 0: every data-parallel rank holds everything."""

    def __init__(self, parameters: list[nn.Parameter], adamw: GatedAdamW, data_rank: int):
        self._parameters = parameters
        self._adamw = adamw
        self._data_rank = data_rank

    def optimized(self) -> list[torch.Tensor]:
        """The parameters themselves."""
        return list(self._parameters)

    def link(self) -> None:
        """AdamW's state is by parameter already."""

    def gradients(self) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
        """Whole gradients, from the first data-parallel rank only: all hold the same."""
        if self._data_rank == 0:
            for parameter in self._parameters:
                assert parameter.grad is not None
                yield parameter, parameter.grad

    def gradient_tensors(self) -> Iterator[torch.Tensor]:
        """Those of torch."""
        return (p.grad for p in self._parameters if p.grad is not None)

    def read(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        """Copies; no collective."""
        state = self._adamw.state[parameter]
        return {WEIGHT: parameter.detach().clone()} | {k: state[k].clone() for k in MOMENTS}

    @torch.no_grad()
    def write(self, parameter: nn.Parameter, values: dict[str, torch.Tensor]) -> None:
        """Set in place."""
        parameter.copy_(values[WEIGHT])
        for key in MOMENTS:
            self._adamw.state[parameter][key].copy_(values[key])

    def publish(self) -> None:
        """The fp32 weights are those of forward."""


class Flat:
    """Stages 1 and 2: flat buffers, one per parameter group, cut into one piece per owner.

    DeepSpeed uses two optimizer classes here, which both link each parameter to its piece.
    """

    def __init__(self, parameters: list[nn.Parameter], optimizer: Any):
        self._parameters = parameters
        self._optimizer = optimizer
        # Their norms cannot be configured away in every case. Ours is there, and theirs are a slow
        # pass in float64 that hangs where ranks hold different numbers of parameter groups.
        zero = torch.zeros(())
        optimizer.scaled_global_norm = lambda *_args, **_kwargs: zero
        optimizer.get_grads_for_norm = lambda *_args, **_kwargs: ([zero], {})

    def reduce_at_once(self) -> None:
        """Let stage 2 reduce each gradient as soon as backward has it, not when the next one comes.

        For ranks that hold different towers: what comes next differs, and may come before one of
        the model's own collectives on one rank and after it on another, which hangs.
        """
        for parameter in self._parameters:  # after DeepSpeed's own hook, which fills a bucket
            parameter.register_post_accumulate_grad_hook(
                lambda _: self._optimizer.reduce_ipg_grads()
            )

    def optimized(self) -> list[torch.Tensor]:
        """This rank's piece of the buffer of each parameter group."""
        return [tensor for group in self._optimizer.param_groups for tensor in group["params"]]

    def link(self) -> None:
        """DeepSpeed links after the first step, and then only the first parameter group."""
        self._optimizer._hp_optimizer_states_linked = False
        self._optimizer._lazy_init_hp_params_optimizer_state()

    @staticmethod
    def unreduced(parameter: nn.Parameter) -> torch.Tensor:
        """This rank's whole gradient, summed over micro-batches, to be changed in place.

        Only for stage 1, before the gradients are summed over ranks.
        """
        for key in _SUMS:
            gradient = getattr(parameter, key, None)
            if gradient is not None:
                return gradient
        raise AssertionError("the parameter has no gradient")

    def gradients(self) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
        """Pieces of the reduced gradients; parameters that lie elsewhere are left out."""
        for parameter in self._parameters:
            mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:
                continue
            index: int = parameter._index_in_param_group  # type: ignore[attr-defined]
            gradient = mapping.get_lp_grad_fragment(index).flatten()
            address = mapping.lp_fragment_address
            if gradient.numel() == parameter.numel():  # the bf16 optimizer keeps whole gradients
                gradient = gradient.narrow(0, address.start, address.numel)
            yield parameter, gradient

    def gradient_tensors(self) -> Iterator[torch.Tensor]:
        """Whole ones, by parameter, until they are reduced; pieces, by parameter group, after."""
        for parameter in self._parameters:
            for key in _SUMS:
                gradient = getattr(parameter, key, None)
                if gradient is not None:
                    yield gradient
        yield from _pieces_of_gradients(self._optimizer, self.optimized())

    def read(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        """A sum over the owners of pieces that do not overlap."""
        return {WEIGHT: _present(safe_get_full_fp32_param(parameter))} | {
            key: _present(safe_get_full_optimizer_state(parameter, key)) for key in MOMENTS
        }

    def write(self, parameter: nn.Parameter, values: dict[str, torch.Tensor]) -> None:
        """Set this rank's pieces; no collective."""
        safe_set_full_fp32_param(parameter, values[WEIGHT])
        for key in MOMENTS:
            safe_set_full_optimizer_state(parameter, values[key], key)

    def publish(self) -> None:
        """One all-gather per parameter group, over its owners."""
        self._optimizer.update_lp_params()


class Scattered:
    """Stage 3: each parameter is cut into one padded piece per data-parallel rank."""

    def __init__(self, parameters: list[nn.Parameter], optimizer: Any, data_rank: int):
        self._parameters = parameters
        self._optimizer = optimizer
        self._data_rank = data_rank

    def optimized(self) -> list[torch.Tensor]:
        """Flat buffers of pieces."""
        return list(self._optimizer.fp32_partitioned_groups_flat)

    def link(self) -> None:
        """DeepSpeed finds the state by the parameter's position in the flat buffer."""

    def gradients(self) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
        """Pieces, padded with zeros."""
        for parameter in self._parameters:
            yield parameter, _present(safe_get_local_grad(parameter))

    def gradient_tensors(self) -> Iterator[torch.Tensor]:
        """The buffer that micro-batches are summed in, and what of it the step has been given."""
        yield self._optimizer.grad_partitions_flat_buffer
        yield from _pieces_of_gradients(self._optimizer, self.optimized())

    def read(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        """An all-gather over the data-parallel group."""
        return {WEIGHT: _present(safe_get_full_fp32_param(parameter))} | {
            key: _present(safe_get_full_optimizer_state(parameter, key)) for key in MOMENTS
        }

    def write(self, parameter: nn.Parameter, values: dict[str, torch.Tensor]) -> None:
        """Set this rank's pieces; no collective.

        DeepSpeed's setter of full tensors reads past the end where a piece is padded.
        """
        safe_set_local_fp32_param(parameter, self._piece(parameter, values[WEIGHT]))
        for key in MOMENTS:
            safe_set_local_optimizer_state(parameter, self._piece(parameter, values[key]), key)

    def publish(self) -> None:
        """Copy to the pieces of forward, then gather the parameters that ZeRO-3 keeps whole."""
        optimizer = self._optimizer
        optimizer._partition_all_parameters()
        for index in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

    def _piece(self, parameter: nn.Parameter, full: torch.Tensor) -> torch.Tensor:
        size: int = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        start = self._data_rank * size
        values = full.flatten()[start : start + size]
        return nn.functional.pad(values, (0, size - values.numel()))


def _pieces_of_gradients(optimizer: Any, optimized: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Reduced gradients, until and after they are handed to AdamW."""
    for key in ("averaged_gradients", "all_grad_tensors"):
        for pieces in getattr(optimizer, key, {}).values():
            yield from pieces or ()
    for tensor in optimized:
        if tensor.grad is not None:
            yield tensor.grad


def _present(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None, "DeepSpeed does not manage this parameter"
    return tensor
