"""Helpers to check what commands print to standard error."""

from __future__ import annotations


def only_error(errors: str) -> str:
    """Return the only line besides progress lines, which must be an error.

    A traceback, a warning or a second error fails the test.
    """
    (line,) = [line for line in errors.splitlines() if not line.startswith("mot ")]
    assert line.startswith("error: "), line
    return line
