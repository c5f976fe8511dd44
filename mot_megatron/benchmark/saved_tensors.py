"""Count the bytes that autograd saves for backward while a model runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


class SavedForBackward:
    """A counter of the bytes of tensors saved for backward, and of their peak.

    Every storage counts once. Weights and views of them are not counted, nor are temporaries that
    autograd does not save: they live only during an operation, not until backward.
    """

    def __init__(self, weights: Iterable[torch.nn.Parameter]) -> None:
        self.peak_bytes = 0
        self._weights = list(weights)
        self._kept_bytes = 0
        self._uses: Counter[int] = Counter()

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Count tensors saved by this thread in the ``with`` block.

        On a CPU, backward runs in this thread too.
        """
        with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
            yield

    def keep(self, storage: torch.UntypedStorage) -> None:
        """Count a use of a storage; its bytes count at the first use."""
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
        # Look up addresses every time, because ZeRO-3 gathers weights into new memory.
        weights = {p.untyped_storage().data_ptr() for p in self._weights}
        return tensor if storage.data_ptr() in weights else _Kept(tensor, self)


class _Kept:
    """A saved tensor, counted as long as autograd keeps it."""

    def __init__(self, tensor: torch.Tensor, counter: SavedForBackward) -> None:
        self.tensor = tensor.detach()  # undetached, its graph would keep this object alive
        self._counter = counter
        counter.keep(self.tensor.untyped_storage())

    def __del__(self) -> None:
        self._counter.release(self.tensor.untyped_storage())


def _unpack(packed: torch.Tensor | _Kept) -> torch.Tensor:
    return packed.tensor if isinstance(packed, _Kept) else packed
