"""Train the arms of a comparison, match their steps against the baseline's, and report.

CONFIG_DIR contains base.toml, the arms' files and experiment.toml (see compare/ in ``mot
configs``). Every run is a process with one thread, and --parallel of them run at the same time.
Ctrl-C, SIGTERM or a closed terminal saves all runs and stops; the same command then continues.
Finished runs are not repeated. The output folder contains

    runs/       folders of the runs          logs/       their console output
    curves/     their scalars as CSV         records/    how each run was trained
    report.md   slopes.json   *.png          tensorboard/

--report-only needs only curves/ and records/.

Example: mot compare configs/compare --output comparison
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from mot_megatron.cli.arguments import add_json, add_output, add_overrides, user_path
from mot_megatron.cli.command import print_json, run_command, say
from mot_megatron.errors import ConfigError, TrainingError, UserError

if TYPE_CHECKING:
    from mot_megatron.compare.runs import Outcome

NAME = "compare"
TRAINER = ("-m", "mot_megatron.cli.train")
"""Arguments of the Python interpreter that trains a run."""
STOPPED = 1
"""Exit status if a signal stopped the comparison before its end."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command line."""
    parser.add_argument("config_dir", type=user_path, metavar="CONFIG_DIR")
    add_output(parser, "folder of the runs and the report")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="only these arms (default: all)")
    parser.add_argument(
        "--seeds", nargs="+", type=int, metavar="SEED", help="only these seeds (default: all)"
    )
    parser.add_argument(
        "--parallel", type=int, default=2, help="runs at the same time (default: 2)"
    )
    add_overrides(parser, "override a key of every run's configuration; may be repeated")
    parser.add_argument(
        "--report-only", action="store_true", help="train nothing; report the finished runs"
    )
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Train the runs that have not finished, then report; return 1 if stopped before the end."""
    if options.parallel < 1:
        raise ConfigError(f"--parallel {options.parallel}: must be at least 1")
    outcome = None if options.report_only else compare(options)
    if outcome and outcome.failures:
        report_rest(options, outcome.failures)
    if outcome and outcome.stopped:
        line = f"stopped; run the same command to continue: {options.command}"
        print(line, file=sys.stderr if options.json else sys.stdout)
        return STOPPED
    report(options)
    return 0


def compare(options: argparse.Namespace) -> Outcome:
    """Train the runs that have not finished; a run that fails does not stop the others.

    Raises:
        UserError: The input is invalid.
    """
    say(NAME, f"reading {options.config_dir}")

    import torch

    from mot_megatron.compare.experiment import (
        Circumstances,
        PlannedRun,
        is_recorded,
        plan_runs,
        record_run,
    )
    from mot_megatron.compare.runs import Launch, sole_user, train_all
    from mot_megatron.job.distributed import works_on_gpus
    from mot_megatron.job.hardware import describe_machine

    output: Path = options.output
    runs = plan_runs(
        options.config_dir,
        output,
        arms=options.arms,
        seeds=options.seeds,
        overrides=options.overrides,
    )
    device = torch.device("cuda" if works_on_gpus() else "cpu")
    circumstances = Circumstances(options.command, options.parallel, describe_machine(device))
    launch = Launch(
        trainer=(sys.executable, *TRAINER),
        environment={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        logs=output / "logs",
        parallel=options.parallel,
    )

    def on_end(run: PlannedRun) -> None:
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        trained_by = shlex.join(["python", *launch.command(run)[1:]])
        record_run(run, output, circumstances, ended=now, command=trained_by)

    with sole_user(output) as lock:
        ended = [run for run in runs if is_recorded(run, output)]
        for run in runs:
            # A comparison that was killed may not have recorded the runs that finished last.
            if run not in ended and run.has_ended:
                on_end(run)
                ended.append(run)
        waiting = [run for run in runs if run not in ended]
        return train_all(waiting, ended, launch, lock, on_end)


def report(options: argparse.Namespace) -> None:
    """Report the finished runs.

    Raises:
        UserError: There are too few runs to compare, or a file cannot be read or written.
    """
    say(NAME, f"reporting {options.output}")

    from mot_megatron.compare.experiment import load_experiment
    from mot_megatron.compare.match_files import SLOPES_FILE
    from mot_megatron.compare.report import write_report

    paths = write_report(load_experiment(options.config_dir), options.output)
    if options.json:
        matches = json.loads((options.output / SLOPES_FILE).read_text(encoding="utf-8"))
        print_json({"matches": matches, "written": list(map(str, paths))})
        return
    for path in paths:
        print(f"wrote {path}")


def report_rest(options: argparse.Namespace, failures: Sequence[str]) -> NoReturn:
    """Report the finished runs, then raise an error because others failed.

    Raises:
        TrainingError: Always, with the first failure.
    """
    try:
        report(options)
    except UserError as error:
        print(f"no report: {error}", file=sys.stderr if options.json else sys.stdout)
    more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
    raise TrainingError(f"{failures[0]}{more}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``mot compare``; return the exit status: 1 if stopped, 2 after an error."""
    given = sys.argv[1:] if arguments is None else arguments

    def run_as_given(options: argparse.Namespace) -> int:
        options.command = shlex.join(["mot", NAME, *given])
        return run(options)

    return run_command(NAME, __doc__, add_arguments, run_as_given, given)
