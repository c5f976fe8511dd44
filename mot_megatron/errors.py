"""Errors that a user can mend: entry points print their one line and exit with status 2.

Anything else that escapes is a defect of ours and keeps its traceback.
"""


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
