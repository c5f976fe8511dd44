"""Errors that a user can fix: entry points print one line and exit with status 2.

Any other exception that reaches an entry point is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError

Location = tuple[int | str, ...]
"""Path of keys and indices to a value in a nested structure."""


class UserError(Exception):
    """An error that the user can fix.

    Its message says what is wrong, where (file, key or document), the value found and what is
    allowed.
    """


class ConfigError(UserError):
    """A configuration key, a value or a combination of keys is illegal."""


class DataError(UserError):
    """A corpus, document or token cannot be used."""


class CheckpointError(UserError):
    """A checkpoint cannot be written, found, verified, or loaded into this model."""


class TrainingError(UserError):
    """Training cannot continue, for example because the loss is not finite."""


def first_problem(
    error: ValidationError, allowed_at: Callable[[Location], Iterable[str]] | None = None
) -> str:
    """Describe the first problem of a validation error, and count the others.

    Args:
        error: Raised by a pydantic model.
        allowed_at: Returns the keys allowed in a section, listed after an unknown key.
    """
    problems = error.errors(include_url=False)
    first = problems[0]
    key = ".".join(str(part) for part in first["loc"])
    if not key:
        message = first["msg"]
    elif first["type"] == "extra_forbidden":
        allowed = () if allowed_at is None else sorted(allowed_at(first["loc"][:-1]))
        message = f"{key}: unknown key{_hint(str(first['loc'][-1]), allowed)}"
    elif first["type"] == "missing":
        message = f"{key}: required, but absent"
    else:
        reason = first["msg"].removeprefix("Value error, ")
        message = f"{key} = {first['input']!r}: {reason[0].lower()}{reason[1:]}"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return message + more


def _hint(unknown: str, allowed: Sequence[str]) -> str:
    if not allowed:
        return ""
    close = difflib.get_close_matches(unknown, allowed, n=1)
    meant = f"; did you mean {close[0]}" if close else ""
    return f"{meant}; allowed: {', '.join(allowed)}"
