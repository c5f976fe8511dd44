"""Routing in which all experts take equally many tokens, so that no shape depends on values.

Expert choice gives every expert as many tokens in training too. Top-k does not, unless its experts
are balanced; tokens that a capacity would drop are then none.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch.utils._python_dispatch import _disable_current_modes

from mot_megatron.config_model import ExpertsConfig
from mot_megatron.model.routing import Router, Routing, RoutingPool, expert_rows


def tokens_per_expert(settings: ExpertsConfig, num_tokens: int) -> list[int]:
    """Return how many of a pool's tokens each expert takes; they differ by one at most."""
    num_experts = settings.num_moe_experts
    if settings.routing == "expert_choice":
        return [expert_rows(settings, num_tokens, settings.experts_per_token)] * num_experts
    topk = settings.topk or 1
    share, rest = divmod(num_tokens * topk, num_experts)
    counts = [share + (expert < rest) for expert in range(num_experts)]
    if settings.capacity_factor is not None:
        capacity = expert_rows(settings, num_tokens, settings.capacity_factor * topk)
        counts = [min(count, capacity) for count in counts]
    return counts


@functools.lru_cache(maxsize=8)
def _assignment(counts: tuple[int, ...], num_tokens: int) -> np.ndarray:
    """Return [N, E] bool: experts take successive tokens, and begin anew after the last."""
    assigned = np.zeros((num_tokens, len(counts)), dtype=bool)
    first = 0
    for expert, count in enumerate(counts):
        assigned[np.arange(first, first + count) % max(1, num_tokens), expert] = True
        first += count
    return assigned


@contextlib.contextmanager
def balanced_routing() -> Iterator[None]:
    """Make all routers assign equally many tokens to each expert; for real tensors."""
    forward = Router.forward

    def balanced(router: Router, x: torch.Tensor, pool: RoutingPool) -> Routing:
        routing = forward(router, x, pool)
        with _disable_current_modes():
            own = np.zeros(routing.assigned.shape, dtype=bool)
            part = _of_ranks(router, len(x), pool.num_tokens)[_pool_rank(router)]
            own[: len(part)] = part
            return routing._replace(assigned=torch.from_numpy(own))

    with mock.patch.object(Router, "forward", balanced):
        yield


class KnownCounts:
    """The numbers that the host reads from routings in a world of tensors without values."""

    def __init__(self) -> None:
        self._counts = np.zeros((1, 1), dtype=np.int64)
        self._rank = 0

    @property
    def selected(self) -> int:
        """Pairs of a row of this rank and an expert, by the router that ran last."""
        return int(self._counts[self._rank].sum())

    @contextlib.contextmanager
    def patched(self) -> Iterator[None]:
        """Follow all routers, and give their counts to megatron's dispatchers."""
        forward, preprocess = Router.forward, MoEAlltoAllTokenDispatcher.preprocess

        def followed(router: Router, x: torch.Tensor, pool: RoutingPool) -> Routing:
            parts = _of_ranks(router, len(x), pool.num_tokens)
            self._counts = np.stack([part.sum(axis=0) for part in parts])
            self._rank = _pool_rank(router)
            return forward(router, x, pool)

        def with_counts(dispatcher: MoEAlltoAllTokenDispatcher, routing_map: torch.Tensor) -> Any:
            result = preprocess(dispatcher, routing_map)
            self._tell(dispatcher)
            return result

        with (
            mock.patch.object(Router, "forward", followed),
            mock.patch.object(MoEAlltoAllTokenDispatcher, "preprocess", with_counts),
        ):
            yield

    def _tell(self, dispatcher: MoEAlltoAllTokenDispatcher) -> None:
        """Set what ``preprocess`` computes; the ranks of the expert group have equal pools."""
        held, size = dispatcher.num_local_experts, dispatcher.ep_size
        first = dispatcher.local_expert_indices[0]
        tensor_size = len(self._counts)
        local = np.repeat(self._counts[:, None, first : first + held], size, axis=1)
        of_ranks = local.sum(axis=2)  # [tensor-parallel, expert-parallel]
        own = self._counts[self._rank].reshape(size, held).sum(axis=1)
        # Arrays, because operators would take the values of tensors before megatron reads them.
        dispatcher.input_splits = own.view(_OnHost)
        dispatcher.output_splits = of_ranks[self._rank].view(_OnHost)
        dispatcher.output_splits_tp = of_ranks.sum(axis=1).view(_OnHost)
        dispatcher.num_global_tokens_per_local_expert = local.reshape(-1, held)
        chunks = np.arange(held * size * tensor_size)
        orders = {
            "sort_input_by_local_experts": chunks.reshape(-1, held).T.ravel(),
            "restore_output_by_local_experts": chunks.reshape(held, -1).T.ravel(),
        }
        for name, order in orders.items():
            setattr(dispatcher, name, order)


class _OnHost(np.ndarray):
    """An array that takes the place of a tensor."""

    def numpy(self) -> np.ndarray:
        """Return the array itself."""
        return self.view(np.ndarray)


def _pool_rank(router: Router) -> int:
    return 0 if router.pool_group is None else router.pool_group.rank()


def _of_ranks(router: Router, rows: int, num_tokens: int) -> list[np.ndarray]:
    """Return the assignment of the tokens of every rank of the pool, which have ``rows`` each."""
    size = 1 if router.pool_group is None else router.pool_group.size()
    assigned = _assignment(tuple(tokens_per_expert(router.settings, num_tokens)), num_tokens)
    # Only the last rows are without a token.
    return [assigned[rank * rows : (rank + 1) * rows] for rank in range(size)]
