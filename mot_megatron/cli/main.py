"""``mot``: the command line for everything except training, which the launcher starts."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import NamedTuple

TRAINING = (
    "training is started by the launcher, one process per GPU:"
    " deepspeed --module mot_megatron.cli.train --config FILE"
    " (in a source checkout: deepspeed launch/train.py --config FILE)"
)


class Command(NamedTuple):
    """A command and the module that implements it."""

    module: str
    """Module of this package; its ``main`` takes the arguments after the command."""
    summary: str
    """What the command does, for the overview."""


COMMANDS = {
    "prepare": Command("prepare", "build a corpus of text, images and speech"),
    "inspect": Command("inspect", "show what a corpus contains"),
    "generate": Command("generate", "continue a prompt into text, images and speech"),
    "evaluate": Command("evaluate", "measure the held-out loss by kind of label"),
    "summary": Command("summary", "show the results of a finished run"),
    "upcycle": Command("upcycle", "make a new run from a trained model's weights"),
    "checkpoint": Command("checkpoint", "inspect and convert checkpoints"),
    "plan": Command("plan", "list the layouts that fit in memory"),
    "memory": Command("memory", "measure the memory that each rank needs"),
    "match": Command("match", "match the steps of runs against a baseline"),
    "compare": Command("compare", "train the arms of a comparison and write a report"),
    "benchmark": Command("benchmark", "time a layer or the data path"),
    "drill": Command(
        "drill", "kill, stop and damage training jobs, and check that nothing is lost"
    ),
    "check-machine": Command(
        "check_machine", "check that a machine trains correctly, and how fast it is"
    ),
    "supervise": Command(
        "supervise", "start training, and start it again after a failure that this can mend"
    ),
    "configs": Command("configs", "list or copy the configuration files shipped with the package"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``mot``; return the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    if given and given[0] == "train":
        print(f"mot: {TRAINING}", file=sys.stderr)
        return 2
    return dispatch("mot", COMMANDS, given, epilog=TRAINING)


def dispatch(
    program: str, commands: Mapping[str, Command], arguments: Sequence[str], epilog: str = ""
) -> int:
    """Run the command named by the first argument, or print an overview if there is none.

    Only the module of that command is imported.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview(program, commands, epilog))
        return 0
    name, *rest = arguments
    if name not in commands:
        print(
            f"error: {program} {name}: no such command; allowed: {', '.join(commands)}",
            file=sys.stderr,
        )
        return 2
    return import_module(f"mot_megatron.cli.{commands[name].module}").main(rest)


def overview(program: str, commands: Mapping[str, Command], epilog: str) -> str:
    """Return the text of ``--help``."""
    width = max(map(len, commands))
    lines = [f"usage: {program} COMMAND [OPTIONS]", "", "commands:"]
    lines += [f"  {name:{width}}  {command.summary}" for name, command in commands.items()]
    lines += ["", f"{program} COMMAND --help explains a command."]
    return "\n".join([*lines, *(["", epilog] if epilog else [])])
