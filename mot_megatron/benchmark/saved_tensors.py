"""Counts, while a model runs, the bytes that autograd keeps for backward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


class SavedForBackward:
    """Bytes that are kept now and were kept at most, storages counted once.

    Weights are left out, views of them included. What a layer computes and nothing saves is not
    counted either: it lives for an operation, not until backward.
    """

    def __init__(self, weights: Iterable[torch.nn.Parameter]) -> None:
        self.peak_bytes = 0
        self._weights = list(weights)
        self._kept_bytes = 0
        self._uses: Counter[int] = Counter()

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Count what is saved inside, by this thread; on a CPU backward runs in it too."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
            yield

    def keep(self, storage: torch.UntypedStorage) -> None:
        """Count a use; of the first, the bytes."""
        self._uses[storage.data_ptr()] += 1
        if self._uses[storage.data_ptr()] == 1:
            self._kept_bytes += storage.nbytes()
            self.peak_bytes = max(self.peak_bytes, self._kept_bytes)

    def release(self, storage: torch.UntypedStorage) -> None:
        """Undo ``keep``."""
        self._uses[storage.data_ptr()] -= 1
        if not self._uses[storage.data_ptr()]:
            del self._uses[storage.data_ptr()]
            self._kept_bytes -= storage.nbytes()

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _Kept:
        storage = tensor.untyped_storage()
        # Looked up anew each time: ZeRO-3 gathers weights to other places.
        weights = {p.untyped_storage().data_ptr() for p in self._weights}
        return tensor if storage.data_ptr() in weights else _Kept(tensor, self)


class _Kept:
    """A saved tensor, for as long as autograd holds on to it."""

    def __init__(self, tensor: torch.Tensor, counter: SavedForBackward) -> None:
        self.tensor = tensor.detach()  # with its history it would keep itself alive
        self._counter = counter
        counter.keep(self.tensor.untyped_storage())

    def __del__(self) -> None:
        self._counter.release(self.tensor.untyped_storage())


def _unpack(packed: torch.Tensor | _Kept) -> torch.Tensor:
    return packed.tensor if isinstance(packed, _Kept) else packed
