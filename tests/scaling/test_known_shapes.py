"""Remembered shapes are those that torch computes, and what shares memory is not remembered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mot_megatron.scaling.known_shapes import KnownShapes

ATEN = torch.ops.aten


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def like(result: Any) -> Any:
    if isinstance(result, tuple):
        return tuple(map(like, result))
    return result.shape, result.stride(), result.dtype, result.storage_offset(), result.device


CALLS: list[Callable[[], tuple[Any, tuple[Any, ...], dict[str, Any]]]] = [
    lambda: (ATEN.mm.default, (meta(3, 4), meta(5, 4).t()), {}),
    lambda: (ATEN.mm.default, (meta(4, 3).t(), meta(4, 5)), {}),
    lambda: (ATEN.silu.default, (meta(6, 4)[:, :2],), {}),
    lambda: (ATEN.silu.default, (meta(6, 2, dtype=torch.bfloat16),), {}),
    lambda: (ATEN.add.Tensor, (meta(5, 1), meta(1, 7)), {"alpha": 2}),
    lambda: (ATEN.mul.Tensor, (meta(5, dtype=torch.int64), 1), {}),
    lambda: (ATEN.mul.Tensor, (meta(5, dtype=torch.int64), 1.0), {}),
    lambda: (ATEN.mul.Tensor, (meta(5, dtype=torch.int64), True), {}),
    lambda: (ATEN.cat.default, ([meta(2, 3), meta(4, 3)],), {}),
    lambda: (ATEN.cat.default, ([meta(2, 3), meta(2, 4)], 1), {}),
    lambda: (ATEN.sum.dim_IntList, (meta(0, 3), [0]), {"dtype": torch.float64}),
    lambda: (ATEN.topk.default, (meta(4, 9), 2), {}),
    lambda: (ATEN.index_select.default, (meta(9, 2), 0, meta(4, dtype=torch.int64)), {}),
    lambda: (ATEN._to_copy.default, (meta(3, 2).t(),), {"dtype": torch.bfloat16}),
]


def test_remembered_results_are_like_those_of_torch() -> None:
    shapes = KnownShapes()
    for _ in range(3):
        for call in CALLS:  # others between two equal calls
            func, args, kwargs = call()
            expected = func(*args, **kwargs)
            actual = shapes.call(func, args, kwargs)
            assert like(actual) == like(expected), func


def test_results_share_no_memory() -> None:
    shapes = KnownShapes()
    for call in CALLS:
        func, args, kwargs = call()
        results = [shapes.call(func, args, kwargs) for _ in range(3)]
        first = [result[0] if isinstance(result, tuple) else result for result in results]
        assert len({each.untyped_storage()._cdata for each in first}) == 3, func


def test_what_shares_memory_is_called_each_time() -> None:
    shapes, x = KnownShapes(), meta(4, 3)
    for _ in range(3):
        viewed = shapes.call(ATEN._unsafe_view.default, (x, [12]), {})
        assert viewed.untyped_storage()._cdata == x.untyped_storage()._cdata
        assert shapes.call(ATEN.t.default, (x,), {}).untyped_storage()._cdata == (
            x.untyped_storage()._cdata
        )
        assert shapes.call(ATEN.add_.Tensor, (x, 1), {}) is x


def test_an_operator_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = []
    real = ATEN.silu.default.__class__.__call__

    def counted(func: Any, *args: Any, **kwargs: Any) -> Any:
        computed.append(func)
        return real(func, *args, **kwargs)

    monkeypatch.setattr(ATEN.silu.default.__class__, "__call__", counted)
    shapes = KnownShapes()
    for rows in (4, 4, 5, 4, 5):
        shapes.call(ATEN.silu.default, (meta(rows, 3),), {})
    assert len(computed) == 2
