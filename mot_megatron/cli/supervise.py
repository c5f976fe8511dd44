"""Start training with the deepspeed launcher, and start it again after a failure.

Example: mot supervise --restarts 5 -- --num_gpus 8 launch/train.py --config configs/mine.toml

After "--" follow the options of deepspeed, the training script (launch/train.py, or --module
mot_megatron.cli.train) and its arguments. The run continues from its newest verified checkpoint. It
is not started again after bad input (status 2), after a request to stop, after too many restarts,
or after a second failure at the same step without a new checkpoint. On several nodes without ssh,
give every node the same command with its own --node_rank; node 0 decides.

SIGINT, SIGTERM, SIGUSR1, SIGHUP, and the file "stop" in the run's folder make the run save and
stop. The exit status is 0 if the run is done or was stopped, and otherwise that of the launcher.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mot_megatron.cli.arguments import positive_int
from mot_megatron.cli.command import run_command, say
from mot_megatron.errors import ConfigError

NAME = "supervise"
_MODULE = "mot_megatron.cli.train"
_SCRIPT = "train.py"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command line."""
    parser.add_argument(
        "--restarts",
        type=positive_int,
        default=5,
        metavar="N",
        help="start again at most N times within the window (default 5)",
    )
    parser.add_argument(
        "--window-minutes",
        type=positive_int,
        default=60,
        metavar="M",
        help="length of the window (default 60)",
    )
    parser.add_argument(
        "--status-if-stopped",
        type=int,
        default=0,
        metavar="STATUS",
        help="exit status of node 0 if a signal stopped the run before its last step (default 0);"
        " a batch script can then put the job back into its queue",
    )
    parser.add_argument(
        "launch",
        nargs="*",
        metavar="-- DEEPSPEED_OPTIONS SCRIPT ARGUMENTS",
        help="arguments of deepspeed, as without supervision",
    )


def run(options: argparse.Namespace) -> int:
    """Supervise the run and return the exit status."""
    from mot_megatron.cli.train import parse_arguments
    from mot_megatron.config_files import load_config
    from mot_megatron.job.hosts import LAUNCHER
    from mot_megatron.run.relaunch import RestartPolicy
    from mot_megatron.run.supervisor import Supervisor, Task

    before, arguments = _split(options.launch)
    training = parse_arguments(arguments)
    if training.benchmark is not None:
        raise ConfigError("--benchmark: writes no checkpoints, so it cannot be supervised")
    config = load_config(training.config, training.overrides)
    node, has_followers = _node(before)
    task = Task(
        command=(*LAUNCHER, *options.launch),
        run_directory=config.run_directory,
        node=node,
        has_followers=has_followers,
        status_if_stopped=options.status_if_stopped,
    )
    policy = RestartPolicy(options.restarts, 60.0 * options.window_minutes)
    return Supervisor(task, policy, lambda text: say(NAME, text)).run()


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the options of deepspeed and the arguments of training."""
    for index, word in enumerate(words):
        if word == _MODULE or Path(word).name == _SCRIPT:
            return list(words[:index]), list(words[index + 1 :])
    given = " ".join(words) or "nothing"
    raise ConfigError(
        f"after '--': {given}; expected options of deepspeed, then launch/train.py or --module"
        f" {_MODULE}, then --config FILE"
    )


def _node(words: Sequence[str]) -> tuple[int, bool]:
    """Return this node's number, and whether other nodes have launchers of their own."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--node_rank", type=int, default=0)
    parser.add_argument("--no_ssh", action="store_true")
    try:
        found, _ = parser.parse_known_args(list(words))
    except argparse.ArgumentError as error:
        raise ConfigError(f"after '--': {error}") from None
    return max(0, found.node_rank), found.no_ssh


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``mot supervise``; return the exit status."""
    return run_command(NAME, __doc__, add_arguments, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
