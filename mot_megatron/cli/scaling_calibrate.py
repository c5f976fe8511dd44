"""Measure this machine and write its profile, with which steps on it can be forecast.

Example: deepspeed --num_gpus 8 --module mot_megatron.cli.scaling_calibrate
             --config configs/paper/443m-mot-3.toml --output mine.toml

Start it with the launcher, like training: on one node, or on all nodes of a hostfile for the
network as well. The slowest rank counts. Measured are matrix products at the shapes of the
configuration's layers, causal attention, copies in memory, the start of an operator, every kind of
collective over the groups of every axis of the configuration's layout, and messages within a node
and between nodes. It takes a few minutes, and no rank should have other work.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mot_megatron.cli.arguments import add_config, add_local_rank, user_path
from mot_megatron.cli.command import hide_gpus_from_cpu_ranks, run_command, say
from mot_megatron.errors import ConfigError, DataError
from mot_megatron.job.launch import read_launch

if TYPE_CHECKING:
    import torch

    from mot_megatron.config import Config
    from mot_megatron.scaling.machine import MeasuredGroup

NAME = "benchmark scaling calibrate"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command line."""
    add_config(parser)
    parser.add_argument(
        "--output", type=user_path, required=True, metavar="FILE", help="profile to write (TOML)"
    )
    add_local_rank(parser)


def run(options: argparse.Namespace) -> int:
    """Measure on this rank; rank 0 writes the profile."""
    hide_gpus_from_cpu_ranks()
    launch = read_launch(os.environ)
    if launch.size == 1:
        raise ConfigError(
            "a single rank has no links to measure; start at least two with the launcher:"
            " deepspeed --num_gpus N --module mot_megatron.cli.scaling_calibrate ..."
        )
    if launch.rank == 0:
        say(NAME, f"{launch.size} ranks, {' + '.join(map(str, options.config))}")

    import torch.distributed as dist

    from mot_megatron.config_files import for_world_size, load_config
    from mot_megatron.files import write_atomically
    from mot_megatron.job.distributed import find_world, join_world
    from mot_megatron.rules import check_world_size

    config = for_world_size(load_config(options.config, options.overrides), launch.size)
    check_world_size(config, launch.size)
    device = join_world(find_world(launch))
    text = profile(config, device)
    if launch.rank == 0:
        try:
            write_atomically(options.output, text)
        except OSError as error:
            raise DataError(f"{options.output}: cannot be written: {error.strerror}") from None
        print(text)
    dist.destroy_process_group()
    return 0


def profile(config: Config, device: torch.device) -> str:
    """Measure, and return the profile as TOML. Collective over the world."""
    from mot_megatron.job.hardware import device_name
    from mot_megatron.scaling.calibrate import device_rates, ranks_per_node
    from mot_megatron.scaling.calibrate_links import measured_links

    per_node, nodes = ranks_per_node()
    rates = device_rates(config, device)
    links = measured_links(config, per_node, nodes, device)
    name = f"{per_node} x {device_name(device)}"
    source = f"calibrated {datetime.date.today():%Y-%m-%d} in {config.training.precision}"
    numbers = {
        "device": {
            "matrix_tflops": rates.matrices / 1e12,
            "attention_tflops": rates.attention / 1e12,
            "memory_gb": memory_bytes(device, per_node) / 1e9,
            "memory_tb_per_s": rates.memory / 1e12,
            "launch_us": 1e6 / rates.launches,
        },
        "node": {"devices": per_node, "link_gb_per_s": links.within / 1e9},
        "network": {
            **({"gb_per_s": links.between / 1e9} if links.between else {}),
            "latency_us": links.latency * 1e6,
        },
    }
    lines = [f"# {name}, measured.", f'name = "{name}"']
    for table, values in numbers.items():
        lines += ["", f"[{table}]"]
        lines += [
            f'{key} = {{ value = {value:.6g}, stamp = "MEASURED", source = "{source}" }}'
            for key, value in values.items()
        ]
    return "\n".join([*lines, *(entry(group, source) for group in links.groups), ""])


def entry(group: MeasuredGroup, source: str) -> str:
    """Return the table of a measured group."""
    latencies = ", ".join(f"{kind} = {1e6 * it.latency:.4g}" for kind, it in group.lines.items())
    rates = ", ".join(f"{kind} = {it.bandwidth / 1e9:.4g}" for kind, it in group.lines.items())
    return "\n".join(
        [
            "",
            "[[groups]]",
            f'axes = "{group.axes}"',
            f"size = {group.shape.size}",
            f"per_node = {group.shape.per_node}",
            'stamp = "MEASURED"',
            f'source = "{source}"',
            f"latency_us = {{ {latencies} }}",
            f"gb_per_s = {{ {rates} }}",
        ]
    )


def memory_bytes(device: torch.device, per_node: int) -> int:
    """Return the memory of a GPU, or a rank's share of the host's."""
    import psutil
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total // per_node


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``mot benchmark scaling calibrate``; return the exit status."""
    return run_command(NAME, __doc__, add_arguments, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
