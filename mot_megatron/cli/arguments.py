"""Definitions of the arguments that several commands share."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError
from pathlib import Path

from mot_megatron.files import expand_path

CHECKPOINT_HELP = (
    "trained model: folder of a run or of its checkpoints (the newest is used), or of a single"
    " checkpoint"
)


def add_config(parser: ArgumentParser) -> None:
    """Add ``--config`` and ``--set``."""
    parser.add_argument(
        "--config",
        type=user_path,
        action="append",
        required=True,
        metavar="FILE",
        help="TOML configuration file; may be repeated, later files override earlier ones",
    )
    add_overrides(parser, "override a key of the configuration; may be repeated")


def add_overrides(parser: ArgumentParser, help_text: str) -> None:
    """Add ``--set`` and ``--unset``; the parsed values are in ``overrides``, in their order."""
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help=help_text,
    )
    parser.add_argument(
        "--unset",
        dest="overrides",
        action="append",
        type="-{}".format,
        metavar="SECTION.KEY",
        help="remove a key, so that it has its default; may be repeated",
    )


def add_local_rank(parser: ArgumentParser) -> None:
    """Add ``--local_rank``, which the launcher gives to every process that it starts."""
    parser.add_argument(
        "--local_rank", type=int, help="set by the launcher, which sets LOCAL_RANK as well"
    )


def add_checkpoint(parser: ArgumentParser) -> None:
    """Add ``--checkpoint``, given exactly once."""
    parser.add_argument(
        "--checkpoint", type=user_path, required=True, metavar="RUN", help=CHECKPOINT_HELP
    )


def add_source_and_destination(parser: ArgumentParser) -> None:
    """Add what all conversions of checkpoints have: SRC, DST and how the output is written."""
    parser.add_argument("source", type=user_path, metavar="SRC", help=CHECKPOINT_HELP)
    parser.add_argument(
        "destination", type=user_path, metavar="DST", help="folder of checkpoints to write to"
    )
    parser.add_argument(
        "--workers",
        type=positive_int,
        default=1,
        metavar="N",
        help="files that are verified or written at a time (default: 1)",
    )
    add_verify_and_dry_run(parser)


def add_verify_and_dry_run(parser: ArgumentParser) -> None:
    """Add ``--verify`` and ``--dry-run``."""
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read the output back and compare it with the source before it gets its name",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything and print the plan, but write none"
    )


def add_checkpoints(parser: ArgumentParser, help_text: str = CHECKPOINT_HELP) -> None:
    """Add a repeatable ``--checkpoint``; the parsed values are in ``checkpoints``."""
    parser.add_argument(
        "--checkpoint",
        dest="checkpoints",
        type=user_path,
        action="append",
        required=True,
        metavar="RUN",
        help=f"{help_text}; may be repeated",
    )


def add_moved_corpus(parser: ArgumentParser) -> None:
    """Add ``--corpus``, for commands that load a trained model."""
    parser.add_argument(
        "--corpus",
        type=user_path,
        metavar="DIR",
        help="the model's corpus, if it has moved since training",
    )


def add_output(parser: ArgumentParser, help_text: str, *, required: bool = True) -> None:
    """Add ``--output``."""
    parser.add_argument(
        "--output", type=user_path, required=required, metavar="DIR", help=help_text
    )


def add_json(parser: ArgumentParser) -> None:
    """Add ``--json``."""
    parser.add_argument("--json", action="store_true", help="print one JSON document instead")


def user_path(text: str) -> Path:
    """Parse a path; see ``expand_path``."""
    try:
        return expand_path(text)
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r}: {error}") from error


def positive_int(text: str) -> int:
    """Parse a whole number above 0."""
    value = int(text)
    if value < 1:
        raise ArgumentTypeError(f"{text}, expected at least 1")
    return value


def positive_float(text: str) -> float:
    """Parse a finite number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise ArgumentTypeError(f"{text}, expected a number above 0")
    return value
