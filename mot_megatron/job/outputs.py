"""Standard output and standard error that cannot end a run.

A reader of the output may go away at any time: ``tee`` ends with the same Ctrl-C, ``head`` has seen
enough, a terminal is closed. The next line would then raise an error before the run is saved.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import Any

_STREAMS = ((1, "stdout"), (2, "stderr"))


def protect_outputs() -> None:
    """Make ``sys.stdout`` and ``sys.stderr`` survive lost readers and unprintable characters.

    Output that can no longer be written goes to the null device. Characters that the encoding
    lacks are replaced. Streams that were redirected inside Python, as tests do, stay as they are.
    """
    for descriptor, name in _STREAMS:
        stream: Any = getattr(sys, name)
        with contextlib.suppress(AttributeError, OSError, ValueError):
            # Unbuffered, as python -u has it, the file itself is where a buffer would be.
            is_unbuffered = isinstance(stream.buffer, io.RawIOBase)
            raw = stream.buffer if is_unbuffered else stream.buffer.raw
            if stream.fileno() != descriptor or isinstance(raw, _TolerantFile):
                continue
            stream.flush()
            file = _TolerantFile(descriptor)
            tolerant = io.TextIOWrapper(
                file if is_unbuffered else io.BufferedWriter(file),  # type: ignore[type-var]
                encoding=stream.encoding,
                errors="replace",
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, tolerant)


def redirect_to_null(descriptor: int) -> None:
    """Redirect a file descriptor to the null device."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


def write_line(descriptor: int, line: str) -> None:
    """Write a line with one system call, from any thread; do nothing if it cannot be written."""
    with contextlib.suppress(OSError):
        os.write(descriptor, f"{line}\n".encode(errors="replace"))


class _TolerantFile(io.RawIOBase):
    """A file descriptor for writing, redirected to the null device on the first error."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def fileno(self) -> int:
        return self._descriptor

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: Any) -> int | None:
        try:
            return os.write(self._descriptor, data)
        except BlockingIOError:
            return None
        except OSError:
            redirect_to_null(self._descriptor)
            return len(data)
