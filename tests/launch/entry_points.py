"""Run an entry point in its own process, forked from a server that has done the slow imports.

The script runs as ``__main__`` with its own arguments, environment, exit status and output. It
starts within 0.2 s; a fresh interpreter would spend 10 s on imports.
"""

from __future__ import annotations

import gc
import os
import runpy
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from torch.multiprocessing import get_context

from tests.ranks import ENVIRONMENT, PRELOAD

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Finished:
    """Exit status, standard output and standard error of an entry point."""

    status: int
    output: str
    errors: str


class EntryPoint:
    """A running script; the end of the ``with`` block kills it if it is still running."""

    def __init__(
        self,
        folder: Path,
        script: str,
        *arguments: str,
        environment: dict[str, str] | None = None,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        """Start ``script``.

        Args:
            folder: Folder for files with its standard output and standard error.
            script: Path relative to the repository.
            arguments: Command-line arguments.
            environment: Environment variables to add.
            prepare: A module-level function to call before the script.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._files = (folder / "stdout", folder / "stderr")
        os.environ.update(ENVIRONMENT)
        context = get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self._process = context.Process(
            target=_execute,
            args=(self._files, [str(ROOT / script), *arguments], environment or {}, prepare),
        )
        self._process.start()

    def __enter__(self) -> EntryPoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.join()

    @property
    def pid(self) -> int:
        """Process id."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def output(self) -> str:
        """Standard output so far."""
        return self._files[0].read_text() if self._files[0].exists() else ""

    @property
    def errors(self) -> str:
        """Standard error up to now."""
        return self._files[1].read_text() if self._files[1].exists() else ""

    def wait(self, timeout: float = 120) -> Finished:
        """Wait for the script to end."""
        self._process.join(timeout)
        status = self._process.exitcode
        assert status is not None, f"still running after {timeout} s: {self.output}"
        return Finished(status, *(file.read_text() for file in self._files))


def run_entry_point(
    folder: Path,
    script: str,
    *arguments: str,
    environment: dict[str, str] | None = None,
    prepare: Callable[[], None] | None = None,
) -> Finished:
    """Run a script until it ends."""
    options = {"environment": environment, "prepare": prepare}
    with EntryPoint(folder, script, *arguments, **options) as running:  # type: ignore[arg-type]
        return running.wait()


def wait_until(condition: Callable[[], object], what: str, timeout: float = 120) -> None:
    """Poll ``condition`` until it is true; ``what`` describes it in the timeout message."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"{what}: timed out after {timeout} s"
        time.sleep(0.02)


def _execute(
    files: tuple[Path, Path],
    command: list[str],
    environment: dict[str, str],
    prepare: Callable[[], None] | None,
) -> None:
    gc.freeze()  # see tests/ranks.py
    for number, file in enumerate(files, start=1):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
    # Tests read the output while the script runs; the launcher uses ``python -u``.
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.update(environment)
    sys.argv = command
    if prepare:
        prepare()
    runpy.run_path(command[0], run_name="__main__")
