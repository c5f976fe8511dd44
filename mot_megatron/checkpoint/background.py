"""Saves that run beside training: one at a time, in a thread, over a process group of its own.

The whole of ``save_checkpoint`` runs in the thread: the write, the hashes, the checks and the
rename. ``torch.distributed.checkpoint.async_save`` would run only the write there, and here is what
it offers and why this project does without:

- Its stagers copy a state of full tensors, which ZeRO does not have: a rank holds pieces of flat
  buffers. Here, these are copied as they are, and assembled in the background (train/staging.py).
- Its thread executor is a thread that calls ``save``, as here.
- Its process executor starts a second process per rank, which imports torch, takes the tensors
  through shared memory and pickles what it sends. It would keep Python's lock free, but writing
  and hashing release that lock most of the time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from typing import Protocol

import torch.distributed as dist

from mot_megatron.checkpoint.find import CheckpointInfo
from mot_megatron.checkpoint.save import Background
from mot_megatron.parallel.timeouts import COLLECTIVE_TIMEOUT

_FIRST_NOTE_SECONDS = 5.0
_NOTE_SECONDS = 30.0


class Save(Protocol):
    """A save whose tensors are staged: a call of ``save_checkpoint`` that lacks this argument."""

    def __call__(self, *, background: Background | None) -> CheckpointInfo:
        """Write the checkpoint; see ``save_checkpoint``."""
        ...


@dataclass(frozen=True)
class Written:
    """A complete save."""

    checkpoint: CheckpointInfo
    seconds: float
    """Time from the first file to the last deletion of an older checkpoint."""


class _Count:
    """Counts the bytes of a write; the writing thread sets it, others read it."""

    def __init__(self) -> None:
        self.total: int | None = None
        self.done = 0
        self._begin = time.monotonic()

    def update(self, n: int) -> None:
        self.done += n

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begin

    def __str__(self) -> str:
        done, total = self.done / 1e6, self.total
        if total is None:
            state = "not begun"
        elif self.done < total:
            state = f"{done:.1f} of {total / 1e6:.1f} MB written"
        else:
            state = f"{done:.1f} MB written, but not yet flushed and hashed on all ranks"
        return f"{state} after {self.seconds:.0f} s"


class BackgroundWriter:
    """Runs one save at a time in a thread of this process.

    All ranks make the same calls in the same order. Collectives of a save are over a group of this
    writer, because those of training, in another thread, would mix with them.
    """

    def __init__(self, confirm: Callable[[], None] | None = None) -> None:
        """Create the group, with gloo on any device. Collective over the world.

        Args:
            confirm: See ``Background``.
        """
        self._confirm = confirm
        self._group: dist.ProcessGroup | None = None
        if dist.is_initialized():
            group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
            assert isinstance(group, dist.ProcessGroup)
            self._group = group
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._running: Future[Written] | None = None
        self._count = _Count()

    @property
    def is_busy(self) -> bool:
        """Whether a save was started whose result was not taken yet."""
        return self._running is not None

    @property
    def is_done(self) -> bool:
        """Whether the save in progress, if any, has ended on this rank; others may lag behind."""
        return self._running is None or self._running.done()

    @property
    def has_failed(self) -> bool:
        """Whether the save in progress has failed on this rank; ``take`` then raises the error."""
        return bool(
            self._running and self._running.done() and self._running.exception() is not None
        )

    @property
    def progress(self) -> str:
        """How far this rank's part of the save in progress is."""
        return str(self._count)

    @property
    def seconds(self) -> float:
        """Seconds since the last save was started."""
        return self._count.seconds

    def start(self, save: Save) -> None:
        """Start a save and return at once; the tensors of ``save`` must not change until it ends.

        The save before it must have been taken.
        """
        assert self._running is None, "a save is in progress"
        count = self._count = _Count()
        self._running = self._thread.submit(self._write, save, count)

    def take(self, say: Callable[[str], None]) -> Written:
        """Wait for the save in progress and return it.

        Args:
            say: Receives the progress now and then, if this takes more than a few seconds.

        Raises:
            CheckpointError: The save has failed; raised on every rank that takes it.
        """
        assert self._running is not None, "no save is in progress"
        running, seconds = self._running, _FIRST_NOTE_SECONDS
        while wait_for([running], seconds).not_done:
            say(f"waiting for the save in progress: {self.progress}")
            seconds = _NOTE_SECONDS
        self._running = None
        return running.result()

    def close(self) -> BaseException | None:
        """Wait for the save in progress, if any, and return its error instead of raising it."""
        self._thread.shutdown()
        return None if self._running is None else self._running.exception()

    def _write(self, save: Save, count: _Count) -> Written:
        begin = time.perf_counter()
        checkpoint = save(background=Background(self._group, count, self._confirm))
        return Written(checkpoint, time.perf_counter() - begin)
