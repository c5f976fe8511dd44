"""A loader that prepares micro-batches in a thread, before they are asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from mot_megatron.data.loader import PackedLoader
from mot_megatron.data.streams import Position
from mot_megatron.model.micro_batch import MicroBatch


class PrefetchedLoader(PackedLoader):
    """A ``PackedLoader`` whose thread is some micro-batches ahead; they are the same ones.

    The position is that of the micro-batches that were taken, not of those prepared.
    """

    def __init__(self, *args: Any, ahead: int, pin: bool, **options: Any) -> None:
        """Start at the beginning of epoch 0; the thread starts with the first micro-batch.

        Args:
            args: See ``PackedLoader``.
            ahead: Number of micro-batches to prepare beyond the one that is asked for, at least 1.
            pin: Whether to put them into pinned memory, from which copies to a GPU are
                asynchronous.
            options: See ``PackedLoader``.
        """
        super().__init__(*args, **options)
        self._ahead = ahead
        self._pin = pin
        self._thread = ThreadPoolExecutor(1, "batches")
        self._pending: deque[Future[tuple[MicroBatch, Position]]] = deque()
        self._position = super().state_dict()

    def next_micro_batch(self) -> MicroBatch:
        """Return this rank's next micro-batch; no collectives.

        Raises:
            DataError: It could not be prepared.
        """
        while len(self._pending) <= self._ahead:
            self._pending.append(self._thread.submit(self._prepare))
        batch, self._position = self._pending.popleft().result()
        return batch

    def state_dict(self) -> Position:
        """Return the position after the last micro-batch that was taken; see ``PackedLoader``."""
        return dict(self._position)

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue from the position in ``state``; see ``PackedLoader``."""
        while self._pending:
            future = self._pending.pop()
            if not future.cancel():
                future.exception()  # waits for the thread
        super().load_state_dict(state)
        self._position = super().state_dict()

    def _prepare(self) -> tuple[MicroBatch, Position]:
        batch = super().next_micro_batch()
        return batch.pinned() if self._pin else batch, super().state_dict()
