"""What operators return for tensors without values, computed once per combination of shapes.

torch computes the shape of many results in Python, which takes most of the time of a rehearsal,
although layers repeat the same operators on the same shapes.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

import torch

from mot_megatron.parallel.collectives import tensors_in

_Description = tuple[torch.Size, tuple[int, ...], torch.dtype]
"""Size, strides and dtype of a tensor."""
_UNKNOWN = ((), False)


class KnownShapes:
    """Calls operators on meta tensors, and remembers the shapes of what they returned."""

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[tuple[_Description, ...], bool]] = {}

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return new meta tensors like those that ``func(*args, **kwargs)`` returns.

        An operator that changes its arguments, or whose result may share memory with them, is
        called.
        """
        if not _is_functional(func):
            return func(*args, **kwargs)
        try:
            key = func, _shapes(args), _shapes(tuple(kwargs.items()))
            known = self._known.get(key)
        except TypeError:  # an argument that is not hashable
            return func(*args, **kwargs)
        if known is None:
            result = func(*args, **kwargs)
            self._known[key] = _describe(result, (args, kwargs))
            return result
        described, is_tuple = known
        if known is _UNKNOWN:
            return func(*args, **kwargs)
        made = tuple(
            torch.empty_strided(size, strides, dtype=dtype, device="meta")
            for size, strides, dtype in described
        )
        return made if is_tuple else made[0]


@functools.cache
def _is_functional(func: Any) -> bool:
    schema = func._schema
    values = (*schema.arguments, *schema.returns)
    return (
        func.namespace == "aten"
        and not schema.is_mutable
        and all(value.alias_info is None for value in values)
        and all(str(value.type) == "Tensor" for value in schema.returns)
        and len(schema.returns) > 0
    )


def _shapes(value: Any) -> Hashable:
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple(map(_shapes, value))
    return type(value), value  # 1, 1.0 and True are equal, but not as arguments


def _describe(result: Any, arguments: Any) -> tuple[tuple[_Description, ...], bool]:
    results = result if isinstance(result, tuple) else (result,)
    used = {_storage(tensor) for tensor in tensors_in(arguments)}
    if any(
        not isinstance(tensor, torch.Tensor) or not tensor.is_meta or _storage(tensor) in used
        for tensor in results
    ):
        return _UNKNOWN
    described = tuple((tensor.size(), tensor.stride(), tensor.dtype) for tensor in results)
    return described, isinstance(result, tuple)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
