"""Worker processes of the builders, with results in task order and progress bars."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from threadpoolctl import threadpool_limits
from tqdm import tqdm

from mot_megatron.job.processes import end_with_parent

Task = TypeVar("Task")
Result = TypeVar("Result")


@contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool of ``workers`` processes. An error or Ctrl-C cancels the pending tasks."""
    # Workers are forked, at the first submit and so before this process has any threads. A spawned
    # worker would import the entry point, and with it torch and megatron, which no worker needs.
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin_worker() -> None:
    # Ctrl-C signals the whole process group, but only the parent should shut the pool down.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threadpool_limits(1)
    end_with_parent()


@dataclass(frozen=True)
class Stage(Generic[Result]):
    """Submitted tasks; ``results`` waits for them."""

    futures: Sequence[Future[list[Result]]]
    items: int
    description: str

    def results(self) -> list[Result]:
        """Return all results in the order of the items, regardless of completion order."""
        collected: list[Result] = []
        with tqdm(total=self.items, desc=self.description, ncols=100) as bar:
            for future in self.futures:
                part = future.result()
                collected += part
                bar.update(len(part))
        return collected


def start_stage(
    pool: ProcessPoolExecutor,
    function: Callable[[list[Task]], list[Result]],
    tasks: Sequence[Task],
    chunk: int,
    description: str,
) -> Stage[Result]:
    """Submit the tasks to ``function`` in chunks; it returns one result per task.

    The chunks do not depend on the number of workers.

    Args:
        pool: Worker processes.
        function: Maps a list of tasks to the list of their results.
        tasks: All tasks.
        chunk: Number of tasks per call of ``function``.
        description: Label of the progress bar.
    """
    starts = range(0, len(tasks), chunk)
    futures = [pool.submit(function, list(tasks[start : start + chunk])) for start in starts]
    return Stage(futures, len(tasks), description)
