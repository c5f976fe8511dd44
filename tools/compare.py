"""Train the arms of a comparison, match their steps against the baseline's, and report.

CONFIG_DIR holds base.toml, the arms' files and experiment.toml (see configs/compare). A run is one
process with one thread; --parallel of them work side by side. What has ended is not run again:
Ctrl-C, SIGTERM or a closed terminal saves all runs and leaves, and the same command goes on from
there. In DIR stay

    runs/       the runs' own folders        logs/       their consoles
    curves/     their scalars as CSV         records/    what each was
    report.md   slopes.json   *.png          tensorboard/

of which curves/ and records/ are all that --report-only needs.

Example: compare.py configs/compare --output comparison
"""

from __future__ import annotations

import argparse
import datetime
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from mot_megatron.errors import ConfigError, TrainingError, UserError

if TYPE_CHECKING:
    from mot_megatron.compare.runs import Outcome

TRAINER = Path(__file__).resolve().parents[1] / "launch" / "train.py"
STOPPED = 1


def compare(options: argparse.Namespace, command: str) -> Outcome:
    """Train what has not ended; a run that fails stops no other.

    Raises:
        UserError: bad input.
    """
    # They import torch and megatron, which takes seconds; --help should not.
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
    circumstances = Circumstances(command, options.parallel, describe_machine(device))
    launch = Launch(
        trainer=(sys.executable, os.path.relpath(TRAINER)),
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
            # A comparison that was killed has no record of what ended last.
            if run not in ended and run.has_ended:
                on_end(run)
                ended.append(run)
        waiting = [run for run in runs if run not in ended]
        return train_all(waiting, ended, launch, lock, on_end)


def report(options: argparse.Namespace) -> None:
    """Report what has ended.

    Raises:
        UserError: it is not enough to compare, or something cannot be read or written.
    """
    from mot_megatron.compare.experiment import load_experiment
    from mot_megatron.compare.report import write_report

    for path in write_report(load_experiment(options.config_dir), options.output):
        print(f"wrote {path}")


def report_rest(options: argparse.Namespace, failures: Sequence[str]) -> NoReturn:
    """Report what has ended beside runs that failed.

    Raises:
        TrainingError: always, of the failures.
    """
    try:
        report(options)
    except UserError as error:
        print(f"no report: {error}")
    more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
    raise TrainingError(f"{failures[0]}{more}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare and report; 1 if asked to stop before the end, 2 after bad input or a failed run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config_dir", type=Path, metavar="CONFIG_DIR")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="only these (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="only these")
    parser.add_argument("--parallel", type=int, default=2, help="runs side by side (default: 2)")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE",
        help="override a key of every run's configuration; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--report-only", action="store_true", help="train nothing; report what has ended"
    )
    options = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    try:
        if options.parallel < 1:
            raise ConfigError(f"--parallel {options.parallel}: needed: 1 or more")
        command = shlex.join(["python", os.path.relpath(__file__), *given])
        outcome = None if options.report_only else compare(options, command)
        if outcome and outcome.failures:
            report_rest(options, outcome.failures)
        if outcome and outcome.stopped:
            print(f"stopped; the same command goes on from here: {command}")
            return STOPPED
        report(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
