"""Measure how training scales on this machine.

Example: mot benchmark scaling measure --config configs/quickstart.toml --world-size 1,2
             --micro-batches 1 --arms dense --output scaling

For every number of ranks, training jobs are started with the deepspeed launcher, which run real
steps on the configuration's corpus but neither save, evaluate nor log. With --arms, each is
followed by jobs of the models to compare with. All jobs are repeated, in turn. The configuration's
[scaling.layouts] may give a layout for every number of ranks. Writes report.md, scaling.json,
plots and a TensorBoard log to the folder of --output.

After the steps that count, each job splits the time of three more by cause. The same command
continues an interrupted measurement, and runs jobs that failed again. Ranks are on this machine,
on those of a host file or on those of a SLURM job; all of them must see the folder of --output.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mot_megatron.cli.arguments import add_json, add_output, positive_int, user_path
from mot_megatron.cli.command import print_json, run_command, say
from mot_megatron.cli.scaling_rehearse import (
    add_arms,
    add_best,
    add_work,
    arms_at_sizes,
    chooser,
    resolve,
    world_sizes,
)
from mot_megatron.cli.timed_jobs import add_timing, job_environment, on_corpus, shares_text
from mot_megatron.errors import DataError
from mot_megatron.job.hosts import hosts_of_slurm, read_hostfile

NAME = "benchmark scaling measure"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command line."""
    add_work(parser, is_rehearsal=False)
    add_timing(parser, steps=20, warmup=5, repeats=3, job="jobs per arm and size")
    add_arms(parser)
    add_best(parser)
    parser.add_argument(
        "--machine",
        metavar="FILE|NAME",
        help="profile of this machine, or the name of one in configs/machines; needed for --best",
    )
    hosts = parser.add_mutually_exclusive_group()
    hosts.add_argument(
        "--hostfile",
        type=user_path,
        metavar="FILE",
        help="machines, of which each job takes the first ones that it needs, over ssh; this one"
        " is the first (default: this machine alone)",
    )
    hosts.add_argument(
        "--slurm", action="store_true", help="the machines are those of this SLURM job"
    )
    parser.add_argument(
        "--job-minutes", type=positive_int, default=60, metavar="N", help="limit (default 60)"
    )
    add_output(parser, "folder for the records and the report")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Run the jobs and write the report; return 1 if a job failed."""
    sizes = world_sizes(options.world_size)
    say(NAME, f"{' + '.join(map(str, options.config))} on {options.world_size} ranks")
    environment = job_environment()
    hosts = read_hostfile(options.hostfile) if options.hostfile else None
    if options.slurm:
        hosts = hosts_of_slurm(os.environ)
    if hosts is not None:
        for size in sizes:
            hosts.check(size)
    config, shares = resolve(options)
    config = on_corpus(config, options.synthetic)

    from mot_megatron.scaling.measure import Setting, measure, prepare

    setting = Setting(
        configs=arms_at_sizes(config, sizes, options, chooser(options, sizes, shares)),
        hosts=hosts,
        synthetic=shares_text(config, shares) if options.synthetic else "",
        warmup=options.warmup,
        steps=options.steps,
        repeats=options.repeats,
        weak=options.micro_batches is not None,
        directory=options.output.resolve(),
        environment=environment,
        job_seconds=60.0 * options.job_minutes,
    )
    prepare(setting)
    for _ in measure(setting, lambda line: say(NAME, line)):
        pass
    return write_report(setting.directory, options.json)


def write_report(directory: Path, as_json: bool, slopes: Path | None = None, arm: str = "") -> int:
    """Write and print the report of a measurement; return 1 if a job failed.

    Args:
        directory: Folder of the measurement.
        as_json: Print the figures as JSON instead.
        slopes: ``slopes.json`` of a comparison, for the time to the dense model's loss.
        arm: Arm of that comparison.
    """
    from mot_megatron.files import write_atomically
    from mot_megatron.scaling.conclusions import ratios_of, times_page, times_to_loss
    from mot_megatron.scaling.markdown import wrapped
    from mot_megatron.scaling.measure import read_records
    from mot_megatron.scaling.report import STAMP, document, page, plot, rows_of
    from mot_megatron.scaling.scalars import write_scalars

    description, records = read_records(directory)
    rows = rows_of(description, records)
    figures = document(description, rows, records)
    text = page(description, rows, records)
    if slopes is not None:
        times = times_to_loss(ratios_of(rows), slopes, arm)
        text += wrapped([*times_page(times, slopes, arm, STAMP), ""])
        figures["time_to_dense_loss"] = [asdict(each) for each in times]
    try:
        plot(rows, directory / "scaling.png")
        write_scalars(rows, directory / "tensorboard")
        write_atomically(directory / "report.md", text)
        write_atomically(directory / "scaling.json", json.dumps(figures, indent=1) + "\n")
    except OSError as error:
        raise DataError(f"{directory}: cannot be written: {error.strerror}") from None
    if as_json:
        print_json(figures)
    else:
        print(text)
    return int(bool(figures["failed"]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``mot benchmark scaling measure``; return the exit status."""
    return run_command(NAME, __doc__, add_arguments, run, arguments)
