"""Kill, stop, and damage training jobs at random times, and check that nothing is lost.

Example: mot drill --config configs/quickstart.toml --set training.train_steps=40
             --world-size 2 --minutes 10 --output drill

Every job is started by the deepspeed launcher on this machine. A run is continued after every fault
until it is done; its last checkpoint must then equal that of a run without faults. Checked after
every job: all processes have ended, no checkpoint is lost, at most checkpoint.interval_steps steps
have to be repeated (twice as many if checkpoints are written in the background), and at most one
error is printed. The exit status is 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict

from mot_megatron.cli.arguments import add_config, add_json, add_output, positive_int
from mot_megatron.cli.command import ON_CPU, choose_device, print_json, run_command, say
from mot_megatron.errors import ConfigError, DataError

NAME = "drill"
SETTINGS = {"checkpoint.interval_steps": 5, "checkpoint.keep": 3, "logging.interval_steps": 1}
"""Settings of the drill, unless the command line has others."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command line."""
    add_config(parser)
    parser.add_argument(
        "--world-size", type=positive_int, default=2, metavar="N", help="ranks (default 2)"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=10.0,
        help="time for jobs with faults, after the first without (default 10)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the faults (default 0)")
    parser.add_argument(
        "--fault",
        action="append",
        metavar="KIND",
        help="cause only faults of this kind; may be repeated (default: all kinds)",
    )
    parser.add_argument(
        "--supervise",
        action="store_true",
        help="run jobs under mot supervise: after a killed or suspended process, they must come"
        " back by themselves",
    )
    add_output(parser, "new folder for runs and outputs")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Run the drill and print the table; return 1 if there was a problem."""
    say(NAME, f"preparing {' + '.join(map(str, options.config))}")

    from mot_megatron.config_files import load_config

    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if choose_device().type == "cpu":
        environment |= ON_CPU

    from mot_megatron.drill.faults import KINDS
    from mot_megatron.drill.rounds import Setting, run_rounds, summarize

    unknown = [kind for kind in options.fault or () if kind not in KINDS]
    if unknown:
        raise ConfigError(f"--fault {unknown[0]!r}: expected one of: {', '.join(KINDS)}")
    if options.output.exists() and any(options.output.iterdir()):
        raise DataError(f"{options.output}: exists already, expected a new or empty folder")
    options.output.mkdir(parents=True, exist_ok=True)
    directory = options.output.resolve()
    overrides = [f"{key}={value}" for key, value in SETTINGS.items()]
    overrides += [*options.overrides, f"run.directory={directory}"]
    config = load_config(options.config, overrides)
    arguments = [f"--config={path.resolve()}" for path in options.config]
    arguments += [_argument(override) for override in overrides]
    setting = Setting(
        config,
        tuple(arguments),
        options.world_size,
        directory,
        environment,
        tuple(options.fault or KINDS),
        options.supervise,
    )
    rounds = []
    for each in run_rounds(setting, 60 * options.minutes, options.seed, lambda s: say(NAME, s)):
        rounds.append(each)
        wrong = f"; WRONG: {'; '.join(each.problems)}" if each.problems else ""
        say(
            NAME,
            f"{each.run}: {each.fault} after {each.after_seconds:.1f} s, step {each.fault_step};"
            f" newest checkpoint: step {each.saved_step}{wrong}",
        )
    if options.json:
        print_json({"rounds": [asdict(each) for each in rounds]})
    else:
        print("\n".join(summarize(rounds)))
    return int(any(each.problems for each in rounds))


def _argument(override: str) -> str:
    """Return the argument of training for an override, which begins with "-" if it removes."""
    return f"--unset={override[1:]}" if override.startswith("-") else f"--set={override}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``mot drill``; return the exit status."""
    return run_command(NAME, __doc__, add_arguments, run, arguments)
