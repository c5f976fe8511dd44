"""Check a machine before training on it: are the numbers right, and how fast is it?

Example: mot check-machine --devices 8 --minutes 25 --output check

Runs, the most telling first: versions and limits of the host; operators that have been wrong on
some devices; links between devices; the losses of twenty steps in fp32 and bf16 against recorded
ones; five steps of every branch (ZeRO, offload, recomputation, experts, packing, and with several
devices all parallel axes); then the speed of layers, experts and whole steps, and what single
switches change. Every check runs in a process of its own with a time limit.

After each check, check.json and check.md in the folder of --output have a line with PASS, FAIL,
SLOW or SKIPPED, what was seen, and what to do. The same command continues an interrupted check.
Without a GPU everything runs small, on the CPU. The exit status is 1 if a check failed.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mot_megatron.cli.arguments import add_json, add_output, positive_float, positive_int, user_path
from mot_megatron.cli.command import (
    ON_CPU,
    choose_device,
    hide_gpus_from_cpu_ranks,
    print_json,
    run_command,
    say,
)
from mot_megatron.cli.configs import config_directory
from mot_megatron.errors import ConfigError

if TYPE_CHECKING:
    from mot_megatron.machine_check.checks import Context

NAME = "check-machine"
INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells give it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command line."""
    parser.add_argument(
        "--devices",
        type=positive_int,
        metavar="N",
        help="devices that the largest checks use: GPUs (default: all of this machine), or"
        " processes on a CPU (default 1)",
    )
    parser.add_argument(
        "--minutes",
        type=positive_float,
        default=25.0,
        help="time limit; checks that would take longer are skipped (default 25)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="only the few checks that are most telling"
    )
    parser.add_argument(
        "--only",
        action="append",
        metavar="WORDS",
        help="only checks with these words in their names; may be repeated",
    )
    parser.add_argument("--list", action="store_true", help="list the checks, and run none")
    parser.add_argument(
        "--again",
        action="store_true",
        help="run these checks again, also those that the record has",
    )
    parser.add_argument(
        "--record",
        type=user_path,
        metavar="FILE",
        help="compute the recorded losses anew on this CPU, and write them to FILE (for developers,"
        " after a change of the numbers of training; takes minutes)",
    )
    add_output(parser, "folder of the report", required=False)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Run the checks and print the report; return 1 if one failed."""
    say(NAME, "looking for devices")
    hide_gpus_from_cpu_ranks()
    device = choose_device().type

    from mot_megatron.machine_check.catalog import all_checks
    from mot_megatron.machine_check.checks import Context
    from mot_megatron.machine_check.report import page
    from mot_megatron.machine_check.run import locked, open_record, run_checks

    num_devices = _num_devices(options.devices, device)
    checks = [
        check
        for check in all_checks(device)
        if (check.quick or not options.quick)
        and (not options.only or any(words in check.name for words in options.only))
    ]
    if not checks:
        raise ConfigError(f"--only {' '.join(options.only)}: no check has these words; see --list")
    if options.list:
        for check in checks:
            plural = "s" if check.num_devices > 1 else ""
            needs = f"{check.num_devices} device{plural}"
            print(f"{check.name}: at most {check.seconds:.0f} s, {needs}")
        return 0
    if options.output is None:
        raise ConfigError("--output: required, the folder of the report")
    directory = options.output.resolve()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if device == "cpu":
        environment |= ON_CPU
    context = Context(device, num_devices, directory, config_directory(), environment)
    if options.record is not None:
        return _record_reference(context, options.record)
    again = [check.name for check in checks] if options.again else ()
    record = open_record(directory, _machine(device, num_devices), again)
    try:
        with locked(directory):
            run_checks(checks, context, record, 60 * options.minutes, lambda line: say(NAME, line))
    except KeyboardInterrupt:
        say(NAME, "interrupted; the same command continues")
        return INTERRUPTED
    document = record.document()
    if options.json:
        print_json(document)
    else:
        print(page(record.machine, {n: e.outcome for n, e in record.entries.items()}))
    return int(any(entry.outcome.status == "FAIL" for entry in record.entries.values()))


def _record_reference(context: Context, path: Path) -> int:
    """Compute the reference losses and write them to ``path``.

    Raises:
        ConfigError: The ranks would use GPUs.
        UserError: A job failed.
    """
    from mot_megatron.files import write_atomically
    from mot_megatron.machine_check.parity import record_reference

    if context.on_gpu:
        raise ConfigError("--record: the reference is computed on a CPU; set DS_ACCELERATOR=cpu")
    (context.directory / "logs").mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(record_reference(context), indent=1) + "\n")
    say(NAME, f"wrote {path}")
    return 0


def _num_devices(wanted: int | None, device: str) -> int:
    """Return the number of devices to use.

    Raises:
        ConfigError: The machine has fewer GPUs.
    """
    import torch

    if device == "cpu":
        return wanted or 1
    found = torch.cuda.device_count()
    if wanted is not None and wanted > found:
        raise ConfigError(f"--devices {wanted}: this machine has {found} GPUs")
    return wanted or found


def _machine(device: str, num_devices: int) -> dict[str, Any]:
    """Return what the report says about the machine, and what must not change on continuing."""
    import socket
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    import torch

    from mot_megatron.job.hardware import device_name

    # Asked in another process, so that this one holds no memory of a GPU while checks run.
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        name = pool.submit(device_name, torch.device(device)).result()
    return {
        "host": socket.gethostname(),
        "device": device,
        "name": name,
        "devices": num_devices,
        "torch": torch.__version__,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``mot check-machine``; return the exit status."""
    return run_command(NAME, __doc__, add_arguments, run, arguments)
