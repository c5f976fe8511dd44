"""Access to gradients, fp32 weights and AdamW state, with one interface for all ZeRO stages.

Only this file and reduction.py access the internals of DeepSpeed's optimizers. "Full" means
everything that a tensor-parallel rank holds of a parameter. "Local" means this rank's part of it
under ZeRO, which shards it over the parameter's owners: the data-parallel ranks that hold it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_grad,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import nn

from mot_megatron.optim.adamw import GatedAdamW

WEIGHT = "weight"
"""Key of the fp32 weight, next to those of the AdamW state."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Keys of the AdamW state per element, as in torch."""
_SUMS = ("_hp_grad", "grad_accum", "grad")
"""Attributes of a parameter that may hold the gradient summed over micro-batches: those of
DeepSpeed's bf16 optimizer, of its other optimizer, and of torch."""


class Piece(NamedTuple):
    """The part of a parameter's fp32 weight and moments that this rank stores."""

    start: int
    """Its first element in the flattened full parameter."""
    values: dict[str, torch.Tensor]
    """Live tensors by key, WEIGHT and MOMENTS, flat and equally long; empty if nothing is here.
    A frozen parameter has no moments."""
    is_full: bool
    """Whether every owner stores the full parameter. Otherwise the owners' pieces, in the order of
    their ranks, are the parameter."""


class Partition(Protocol):
    """How one ZeRO stage stores gradients and optimizer state."""

    def optimized(self) -> list[torch.Tensor]:
        """Return the fp32 tensors on this rank that AdamW updates."""
        ...

    def link(self) -> None:
        """Make the AdamW state, which must exist, accessible by parameter."""
        ...

    def gradients(self) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
        """Yield parameters and their local gradients, between the last backward and the step.

        Every element occurs on exactly one of the parameter's owners; padding is zero.
        """
        ...

    def gradient_tensors(self) -> Iterator[torch.Tensor]:
        """Yield all tensors that hold gradients at present; some may share memory."""
        ...

    def read(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        """Return the full fp32 weight and moments. Collective over the parameter's owners."""
        ...

    def piece(self, parameter: nn.Parameter) -> Piece:
        """Return this rank's piece of the fp32 weight and moments, without a copy or collective."""
        ...

    def write(self, parameter: nn.Parameter, values: dict[str, torch.Tensor]) -> None:
        """Set the fp32 weight and moments from full tensors, which are equal on all owners."""
        ...

    def publish(self) -> None:
        """Update the weights that forward reads from the fp32 weights. Collective."""
        ...


class Replicated:
    """Stage 0: every data-parallel rank holds full gradients and optimizer state."""

    def __init__(self, parameters: list[nn.Parameter], adamw: GatedAdamW, data_rank: int):
        self._parameters = parameters
        self._adamw = adamw
        self._data_rank = data_rank

    def optimized(self) -> list[torch.Tensor]:
        """Return the parameters themselves."""
        return list(self._parameters)

    def link(self) -> None:
        """Do nothing: the AdamW state is stored by parameter."""

    def gradients(self) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
        """Yield full gradients on the first data-parallel rank only, since all hold the same."""
        if self._data_rank == 0:
            for parameter in self._parameters:
                assert parameter.grad is not None
                yield parameter, parameter.grad

    def gradient_tensors(self) -> Iterator[torch.Tensor]:
        """Yield the parameters' ``grad``."""
        return (p.grad for p in self._parameters if p.grad is not None)

    def read(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        """Return copies; no collective."""
        state = self._adamw.state[parameter]
        return {WEIGHT: parameter.detach().clone()} | {k: state[k].clone() for k in MOMENTS}

    def piece(self, parameter: nn.Parameter) -> Piece:
        """Return all of it."""
        state = self._adamw.state[parameter]
        tensors = {WEIGHT: parameter.detach()} | {key: state[key] for key in MOMENTS}
        return Piece(0, {key: tensor.view(-1) for key, tensor in tensors.items()}, is_full=True)

    @torch.no_grad()
    def write(self, parameter: nn.Parameter, values: dict[str, torch.Tensor]) -> None:
        """Set the values in place."""
        parameter.copy_(values[WEIGHT])
        for key in MOMENTS:
            self._adamw.state[parameter][key].copy_(values[key])

    def publish(self) -> None:
        """Do nothing: forward reads the fp32 weights."""


class Flat:
    """Stages 1 and 2: one flat buffer per parameter group, split into one piece per owner.

    DeepSpeed has two optimizer classes for these stages. Both link every parameter to its part of a
    piece.
    """

    def __init__(self, parameters: list[nn.Parameter], optimizer: Any):
        self._parameters = parameters
        self._optimizer = optimizer
        # Disable DeepSpeed's gradient norms, which no setting disables in all cases. ZeroEngine
        # computes its own. DeepSpeed's are slow (float64) and deadlock if ranks hold different
        # numbers of parameter groups.
        zero = torch.zeros(())
        optimizer.scaled_global_norm = lambda *_args, **_kwargs: zero
        optimizer.get_grads_for_norm = lambda *_args, **_kwargs: ([zero], {})

    def reduce_at_once(self) -> None:
        """Make stage 2 reduce each gradient as soon as it is ready, not when the next one is.

        This is needed if ranks hold different towers. The next gradient then differs between ranks,
        and might be ready before one of the model's own collectives on one rank but after it on
        another, which would be a deadlock.
        """
        for parameter in self._parameters:  # runs after DeepSpeed's own hook, which fills a bucket
            parameter.register_post_accumulate_grad_hook(
                lambda _: self._optimizer.reduce_ipg_grads()
            )

    def optimized(self) -> list[torch.Tensor]:
        """Return this rank's piece of each parameter group's buffer."""
        return [tensor for group in self._optimizer.param_groups for tensor in group["params"]]

    def link(self) -> None:
        """Link all parameter groups; DeepSpeed does so after the first step, for the first only."""
        self._optimizer._hp_optimizer_states_linked = False
        self._optimizer._lazy_init_hp_params_optimizer_state()

    @staticmethod
    def unreduced(parameter: nn.Parameter) -> torch.Tensor:
        """Return this rank's full gradient, summed over micro-batches, for changes in place.

        This works for stage 1 only, before the gradients are summed over ranks.
        """
        for key in _SUMS:
            gradient = getattr(parameter, key, None)
            if gradient is not None:
                return gradient
        raise AssertionError("the parameter has no gradient")

    def gradients(self) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
        """Yield this rank's pieces of the reduced gradients, of parameters that have one here."""
        for parameter in self._parameters:
            mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:
                continue
            index: int = parameter._index_in_param_group  # type: ignore[attr-defined]
            gradient = mapping.get_lp_grad_fragment(index).flatten()
            address = mapping.lp_fragment_address
            if gradient.numel() == parameter.numel():  # the bf16 optimizer keeps full gradients
                gradient = gradient.narrow(0, address.start, address.numel)
            yield parameter, gradient

    def gradient_tensors(self) -> Iterator[torch.Tensor]:
        """Yield full gradients by parameter, and reduced pieces by parameter group."""
        for parameter in self._parameters:
            for key in _SUMS:
                gradient = getattr(parameter, key, None)
                if gradient is not None:
                    yield gradient
        yield from _pieces_of_gradients(self._optimizer, self.optimized())

    def read(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        """Sum the owners' pieces, which do not overlap."""
        return {WEIGHT: _present(safe_get_full_fp32_param(parameter))} | {
            key: _present(safe_get_full_optimizer_state(parameter, key)) for key in MOMENTS
        }

    def piece(self, parameter: nn.Parameter) -> Piece:
        """Return the part of a buffer that the parameter is linked to."""
        mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return Piece(0, {}, is_full=False)
        tensors = {WEIGHT: mapping.get_hp_fragment()} | {
            key: mapping.get_hp_fragment(key) for key in MOMENTS
        }
        return Piece(mapping.lp_fragment_address.start, tensors, is_full=False)

    def write(self, parameter: nn.Parameter, values: dict[str, torch.Tensor]) -> None:
        """Set this rank's pieces; no collective."""
        safe_set_full_fp32_param(parameter, values[WEIGHT])
        for key in MOMENTS:
            safe_set_full_optimizer_state(parameter, values[key], key)

    def publish(self) -> None:
        """Run one all-gather per parameter group, over its owners."""
        self._optimizer.update_lp_params()


class Scattered:
    """Stage 3: every parameter is split into one padded piece per data-parallel rank."""

    def __init__(self, parameters: list[nn.Parameter], optimizer: Any, data_rank: int):
        self._parameters = parameters
        self._optimizer = optimizer
        self._data_rank = data_rank

    def optimized(self) -> list[torch.Tensor]:
        """Return the flat buffers of pieces."""
        return list(self._optimizer.fp32_partitioned_groups_flat)

    def link(self) -> None:
        """Do nothing: DeepSpeed finds the state by the parameter's position in the flat buffer."""

    def gradients(self) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
        """Yield pieces, padded with zeros."""
        for parameter in self._parameters:
            yield parameter, _present(safe_get_local_grad(parameter))

    def gradient_tensors(self) -> Iterator[torch.Tensor]:
        """Yield the buffer that sums over micro-batches, and the pieces passed to the step."""
        yield self._optimizer.grad_partitions_flat_buffer
        yield from _pieces_of_gradients(self._optimizer, self.optimized())

    def read(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        """Run all-gathers over the data-parallel group."""
        return {WEIGHT: _present(safe_get_full_fp32_param(parameter))} | {
            key: _present(safe_get_full_optimizer_state(parameter, key)) for key in MOMENTS
        }

    def piece(self, parameter: nn.Parameter) -> Piece:
        """Return the piece without its padding."""
        tensors = {WEIGHT: _present(safe_get_local_fp32_param(parameter))} | {
            key: _present(safe_get_local_optimizer_state(parameter, key)) for key in MOMENTS
        }
        return piece_of_owner(parameter, tensors, self._data_rank)

    def write(self, parameter: nn.Parameter, values: dict[str, torch.Tensor]) -> None:
        """Set this rank's pieces; no collective.

        DeepSpeed's setter for full tensors cannot be used: it reads past the end of a tensor whose
        piece is padded.
        """
        safe_set_local_fp32_param(parameter, self._piece(parameter, values[WEIGHT]))
        for key in MOMENTS:
            safe_set_local_optimizer_state(parameter, self._piece(parameter, values[key]), key)

    def publish(self) -> None:
        """Copy to the pieces that forward reads, then gather the parameters ZeRO-3 keeps whole."""
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


def piece_of_owner(
    parameter: nn.Parameter, padded: dict[str, torch.Tensor], data_rank: int
) -> Piece:
    """Return stage 3's piece of a parameter from its padded tensors on this rank."""
    size = padded[WEIGHT].numel()
    start = min(data_rank * size, parameter.ds_numel)  # type: ignore[attr-defined]
    length = min(size, parameter.ds_numel - start)  # type: ignore[attr-defined]
    return Piece(start, {key: full[:length] for key, full in padded.items()}, is_full=False)


def _pieces_of_gradients(optimizer: Any, optimized: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield reduced gradients, both before and after DeepSpeed passes them to AdamW."""
    for key in ("averaged_gradients", "all_grad_tensors"):
        for pieces in getattr(optimizer, key, {}).values():
            yield from pieces or ()
    for tensor in optimized:
        if tensor.grad is not None:
            yield tensor.grad


def _present(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None, "DeepSpeed does not manage this parameter"
    return tensor
