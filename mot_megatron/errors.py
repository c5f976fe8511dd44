"""Errors that a user can mend: entry points print their one line and exit with status 2.

Anything else that escapes is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError

Location = tuple[int | str, ...]
"""Keys and indices that lead to a value in a tree."""


class UserError(Exception):
    """What is wrong, where (file, key or document), the value found and what is allowed."""


class ConfigError(UserError):
    """A configuration key, its value, or a combination of keys is not legal."""


class DataError(UserError):
    """A corpus, document or token cannot be used."""


class CheckpointError(UserError):
    """A checkpoint cannot be written, found, verified or loaded into this model."""


class TrainingError(UserError):
    """Training cannot go on, for example because the loss is not finite."""


def first_problem(
    error: ValidationError, allowed_at: Callable[[Location], Iterable[str]] | None = None
) -> str:
    """The first thing that a model of pydantic's finds wrong, and how many more there are.

    Args:
        error: Of the model.
        allowed_at: The keys that a section may have, to be named beside an unknown one.
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
        message = f"{key} = {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return message + more


def _hint(unknown: str, allowed: Sequence[str]) -> str:
    if not allowed:
        return ""
    close = difflib.get_close_matches(unknown, allowed, n=1)
    meant = f"; did you mean {close[0]}" if close else ""
    return f"{meant}; allowed: {', '.join(allowed)}"
