"""Errors that a user can mend: entry points print their one line and exit with status 2.

Anything else that escapes is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

from pydantic import ValidationError


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


def first_problem(error: ValidationError) -> str:
    """The first thing that a model of pydantic's finds wrong in a file: key, value, what is it."""
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    if not key:
        return first["msg"]
    if first["type"] == "extra_forbidden":
        return f"unknown key {key}"
    if first["type"] == "missing":
        return f"missing key {key}"
    return f"{key} = {first['input']!r}: {first['msg']}"
