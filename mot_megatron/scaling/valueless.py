"""Tensors without values: everything that a training step needs of a tensor but its memory.

They are torch's meta tensors. torch's fake tensors would keep their devices as well, but an
operator costs ten times as much.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch.optim import optimizer as torch_optimizer  # type: ignore[attr-defined]
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

from mot_megatron.scaling.known_shapes import KnownShapes

_convert, _values_of = torch.Tensor.to, torch.Tensor.tolist
META = torch.device("meta")
FAKE_BACKEND = "cpu:fake,meta:fake"
"""Name of a backend whose collectives do nothing, for ``init_process_group``."""


@contextlib.contextmanager
def without_values() -> Iterator[None]:
    """Give all new tensors shapes, but no values."""
    with (
        # torch has these for few devices, of which a CPU is one.
        _on_meta_too(torch_optimizer, "_get_fused_kernels_supported_devices"),
        _on_meta_too(_foreach_utils, "_get_foreach_kernels_supported_devices"),
        mock.patch.object(F, "scaled_dot_product_attention", _attention_of_a_cpu),
        mock.patch.object(torch.Tensor, "tolist", _list_read_by_host),
        mock.patch.object(torch.Tensor, "to", _to),
        mock.patch.object(torch.Tensor, "cpu", _to),
        _WithoutValues(),
    ):
        yield


@contextlib.contextmanager
def with_values() -> Iterator[None]:
    """Let operators work on values again, inside of ``without_values``."""
    _WithoutValues.paused += 1
    try:
        yield
    finally:
        _WithoutValues.paused -= 1


class _WithoutValues(TorchDispatchMode):
    """Makes the result of every operator a meta tensor, whatever device it is asked for.

    An operator sees the shape of an argument that has values, and does not change it.
    """

    paused = 0
    """Number of ``with_values`` that are entered."""

    def __init__(self) -> None:
        super().__init__()
        self._shapes = KnownShapes()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and skipping takes as long as many operators

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator on shapes alone."""
        del types
        kwargs = kwargs or {}
        if self.paused or func.namespace == "c10d":
            return func(*args, **kwargs)
        # Few arguments have values, and mapping all takes longer than the operator.
        if not all(map(_has_no_value, args)) or not all(map(_has_no_value, kwargs.values())):
            args, kwargs = tree_map_only(torch.Tensor, _on_meta, (args, kwargs))
        if kwargs.get("device") is not None or _is_factory(func):
            kwargs["device"] = META
        return self._shapes.call(func, args, kwargs)


def value_read_by_host(dtype: torch.dtype) -> bool | int | float:
    """Return the value that the host reads from a tensor without values.

    Norms are finite, counts are positive, and nothing asks the run to stop.
    """
    if dtype == torch.bool:
        return False
    return 1.0 if dtype.is_floating_point else 1


def _on_meta_too(module: ModuleType, name: str) -> AbstractContextManager[object]:
    """Add meta tensors to the devices that a function of torch lists."""
    devices = getattr(module, name)

    def more() -> list[str]:
        return [*devices(), META.type]

    return mock.patch.object(module, name, more)


def _list_read_by_host(tensor: torch.Tensor) -> Any:
    if not tensor.is_meta:
        return _values_of(tensor)
    if tensor.ndim > 1:
        return [_list_read_by_host(row) for row in tensor]
    return [value_read_by_host(tensor.dtype)] * tensor.numel()


def _has_no_value(argument: Any) -> bool:
    if isinstance(argument, torch.Tensor):
        return argument.is_meta
    return not isinstance(argument, list | tuple) or all(map(_has_no_value, argument))


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_meta:
        return tensor
    with _disable_current_modes():
        return tensor.to(META)


def _to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Convert a tensor; it is on every device already, so moving it copies nothing."""
    if tensor.is_meta:
        args = tuple(META if isinstance(each, str | torch.device) else each for each in args)
        if "device" in kwargs:
            kwargs["device"] = META
    return _convert(tensor, *args, **kwargs)


@functools.cache
def _is_factory(func: Any) -> bool:
    """Return whether an operator makes a tensor from no other tensor."""
    arguments = func._schema.arguments
    takes_tensors = any("Tensor" in str(each.type) for each in arguments)
    return not takes_tensors and any(each.name == "device" for each in arguments)


def _attention_of_a_cpu(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    enable_gqa: bool,
) -> torch.Tensor:
    """Call the kernel that torch chooses for tensors on a CPU."""
    del enable_gqa  # the kernel sees it in the shapes
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(q, k, v, is_causal=is_causal, attn_mask=attn_mask)[0]
