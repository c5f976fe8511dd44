"""Time whole training steps, and compare them with another checkout or other settings.

Example: mot benchmark step --config configs/quickstart.toml --world-size 1,2
             --against ../main --output steps

For every number of ranks, training jobs are started with the deepspeed launcher. They run real
steps on the configuration's corpus (with --synthetic, without one), but neither save, evaluate nor
log. Jobs of this version and the other alternate and are repeated, so that a slow phase of the
machine does not fall on one of them; the ratio is that of neighboring jobs, as median and range.
Memory is the peak of the fullest rank; "sent" is what the busiest rank sends per step. All figures
are MEASURED. The same command continues an interrupted benchmark.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from mot_megatron.cli.arguments import add_json, add_output, user_path
from mot_megatron.cli.command import print_json, run_command, say
from mot_megatron.cli.scaling_rehearse import add_work, configs_of, resolve, world_sizes
from mot_megatron.cli.timed_jobs import add_timing, job_environment, on_corpus, shares_text
from mot_megatron.errors import ConfigError

NAME = "benchmark step"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command line."""
    add_work(parser, is_rehearsal=False)
    parser.add_argument(
        "--against",
        type=user_path,
        metavar="PATH",
        help="another checkout of this program, whose extension is built",
    )
    parser.add_argument(
        "--against-set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="setting of the other jobs alone; may be repeated",
    )
    add_timing(parser, steps=10, warmup=3, repeats=5, job="jobs per version and size")
    add_output(parser, "folder for the records")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Run the jobs and print the table; return 1 if a job failed."""
    sizes = world_sizes(options.world_size)
    say(NAME, f"{' + '.join(map(str, options.config))} on {options.world_size} ranks")
    environment = job_environment()

    from mot_megatron.files import write_atomically
    from mot_megatron.scaling.measure import Setting, measure, prepare, read_records
    from mot_megatron.scaling.versus import (
        OTHER,
        THIS,
        check_checkout,
        split_table,
        step_document,
        step_rows,
        step_table,
    )

    names, overrides = {THIS: "this version"}, {THIS: options.overrides}
    if options.against or options.against_set:
        names[OTHER] = ", ".join([*map(str, filter(None, [options.against])), *options.against_set])
        overrides[OTHER] = [*options.overrides, *options.against_set]
    if options.against:
        check_checkout(options.against)
    configs, synthetic = {}, ""
    for arm, of_arm in overrides.items():
        config, shares = resolve(argparse.Namespace(**{**vars(options), "overrides": of_arm}))
        configs[arm] = configs_of(on_corpus(config, options.synthetic), sizes, options)
        shares_of_arm = shares_text(config, shares)
        if synthetic not in ("", shares_of_arm):
            raise ConfigError("--against-set: both versions need the same modalities")
        synthetic = shares_of_arm
    setting = Setting(
        configs=configs,
        checkouts={OTHER: options.against.resolve()} if options.against else {},
        synthetic=synthetic if options.synthetic else "",
        warmup=options.warmup,
        steps=options.steps,
        repeats=options.repeats,
        weak=options.micro_batches is not None,
        directory=options.output.resolve(),
        environment=environment,
        job_seconds=3600.0,
    )
    prepare(setting)
    for _ in measure(setting, lambda line: say(NAME, line)):
        pass
    records = read_records(setting.directory)[1]
    rows = step_rows(setting.warmup, records)
    document = step_document(rows, names)
    write_atomically(setting.directory / "steps.json", json.dumps(document, indent=1) + "\n")
    if options.json:
        print_json(document)
    else:
        print("\n".join([*step_table(rows, names), "", *split_table(rows, names)]))
    return int(any("error" in record for record in records.values()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``mot benchmark step``; return the exit status."""
    return run_command(NAME, __doc__, add_arguments, run, arguments)
