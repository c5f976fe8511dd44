"""List the layouts of a configuration that fit on a number of GPUs, and their memory.

Example: mot plan --config configs/paper/7b-mot-2.toml --world-size 64 --memory-gb 80

The list consists of the layouts that training accepts, within these limits: tensor and modality
parallelism together stay within a node, tensor parallelism always uses sequence parallelism, and
a pipeline stage has one, two or four pieces. It includes every ZeRO stage and, if towers have
experts, every expert-parallel size. Batch sizes, precision and offloading are taken from the
configuration. Sampling during training (logging.sample_interval_steps) is ignored, because it
excludes pipeline and modality parallelism.

Layouts are sorted by recomputation (less first), then communication (less first), then memory. For
communication, the criteria are in turn: the number of ranks per pass (tensor-parallel ranks times
pipeline stages), tensor-parallel ranks, pieces per stage, the exchange between modality-parallel
ranks (none, then sequences, then heads), and the ZeRO stage.

With --best, they are sorted by the forecast time of a step on --machine instead, estimated from
rehearsals of one and two layers; an estimate is within a tenth of mot benchmark scaling forecast.
Each layout has the least recomputation with which it fits in 90% of the machine's memory, or in
--memory-gb. The time of an offloaded optimizer is not included.

Memory is that of the rank that needs the most, in GB of 10^9 bytes. On the device, it includes the
model state as DeepSpeed stores it, with padding, and activations as autograd stores them on a GPU.
It does not include buffers of collectives, temporary tensors and fragmentation; leave a tenth of
the memory for them. On the host, per rank, "start" is the rank's part of the model, which is built
there before it moves to the GPU, plus the eight largest matrices in fp32. "resume" is 12 bytes per
parameter of that part (4 if its tower is frozen), which are needed to load a checkpoint. Multiply
both by the ranks of a node, and add a few GB for libraries.

With modality parallelism, a rank's activations are estimated for the mean share of its towers'
tokens. A micro-batch with more tokens for these towers needs more memory: in the worst case, that
of all tokens of the group. With data.packing = "budget", every micro-batch has the mean shares.
Experts are assumed to process equally many tokens, as with expert choice; top-k can need more.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mot_megatron.cli.arguments import add_config, add_json
from mot_megatron.cli.command import print_json, run_command, say
from mot_megatron.cli.corpora import resolve_from_corpus
from mot_megatron.cli.plan_best import (
    FILL,
    LAYOUT_HEAD,
    best,
    documents,
    layout_columns,
    machine_and_constants,
    modality_shares,
    rehearse_layers,
    text,
)
from mot_megatron.errors import ConfigError

if TYPE_CHECKING:
    from mot_megatron.config import Config
    from mot_megatron.planning.layouts import Plan

NAME = "plan"
GB = 1e9
LISTED = 40
MODES = {
    "none": "without recomputation",
    "selective": "with selective recomputation",
    "full": "with full recomputation",
}
HEAD = (
    f"{LAYOUT_HEAD}{'dp':>5}{'accum':>6}"
    f"{'tokens':>10}{'weights':>9}{'grads':>8}{'optim':>8}{'act':>8}{'select':>8}{'full':>8}"
    f"{'need':>8}{'start':>7}{'resume':>7}"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command line."""
    add_config(parser)
    parser.add_argument(
        "--world-size", type=int, required=True, metavar="N", help="number of ranks (GPUs)"
    )
    parser.add_argument(
        "--memory-gb",
        type=float,
        metavar="GB",
        help="memory of one GPU, in units of 10^9 bytes (with --machine: 90%% of the profile's)",
    )
    parser.add_argument(
        "--best",
        action="store_true",
        help="rank the layouts by the forecast time of a step on --machine",
    )
    parser.add_argument(
        "--machine",
        metavar="FILE|NAME",
        help="profile of the machine, or the name of one in configs/machines; needed for --best",
    )
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="default 8")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Print the layouts; return 1 if none fits."""
    machine, fitted = machine_and_constants(options.machine) if options.best else (None, None)
    if machine is not None:
        options.gpus_per_node = int(machine.devices_per_node)
        options.memory_gb = options.memory_gb or FILL * machine.memory_gb
    if options.memory_gb is None:
        raise ConfigError("--memory-gb is needed without --best")
    for name in ("world_size", "memory_gb", "gpus_per_node"):
        if getattr(options, name) <= 0:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} {getattr(options, name)}: must be above 0")
    say(NAME, f"reading {' + '.join(map(str, options.config))}")

    from mot_megatron.config_files import load_config

    memory = options.memory_gb * GB
    config, tokens, note = resolve(load_config(options.config, options.overrides))
    plans = plan_all(config, tokens, options)
    notes = [note, *without_samples(config)]
    if machine is not None and fitted is not None:
        bases = rehearse_layers(config, modality_shares(config, tokens))
        found = best(plans, bases, tokens, machine, fitted, memory)
        if options.json:
            print_json({"stamp": "FORECAST", "machine": machine.name, "best": documents(found)})
        else:
            print(text(found, notes, machine, fitted, memory, options.world_size))
        return 0 if found else 1
    plans.sort(key=lambda layout: layout.order(memory))
    fitting = [layout for layout in plans if layout.recompute_for(memory)]
    others = [layout for layout in plans if not layout.recompute_for(memory)]
    if options.json:
        found = [as_dict(layout, memory) for layout in fitting]
        shares = [count / sum(tokens) for count in tokens]
        print_json({"token_shares": shares, "fitting": found, "not_fitting": len(others)})
    else:
        print(report(fitting, notes, memory))
        print(shortfall(others, memory))
    return 0 if fitting else 1


def plan_all(config: Config, tokens: Sequence[int], options: argparse.Namespace) -> list[Plan]:
    """Plan every legal layout.

    Raises:
        ConfigError: There is no legal layout.
    """
    from tqdm import tqdm

    from mot_megatron.planning.layouts import legal_layouts, plan

    layouts = legal_layouts(config, options.world_size, options.gpus_per_node, tokens)
    if not layouts:
        raise ConfigError(
            f"no layout of {options.world_size} GPUs is legal: none divides"
            f" training.global_batch_size = {config.training.global_batch_size} with"
            f" training.micro_batch_size = {config.training.micro_batch_size}, and the sizes of the"
            " model"
        )
    bar = tqdm(layouts, "layouts", ncols=100, leave=False, delay=5, disable=None)
    return [plan(layout, options.world_size, tokens) for layout in bar]


def resolve(config: Config) -> tuple[Config, tuple[int, ...], str]:
    """Read the vocabulary size and each tower's number of tokens from the corpus, if it exists.

    Returns:
        The resolved configuration, the tokens of each tower (only their proportions matter), and a
        line that states their source.

    Raises:
        ConfigError: The vocabulary size is not set, and there is no corpus.
    """
    from mot_megatron.planning.placing import tokens_of_towers

    config, tokens_per_modality = resolve_from_corpus(config)
    model = config.model
    if tokens_per_modality is None:
        if model.vocab_size is None:
            files = ", ".join(f"{folder}/corpus.toml" for folder in config.data.folders)
            raise ConfigError(
                f"model.vocab_size is absent, and there is no {files} to"
                " derive it from; one of them is needed"
            )
        note = f"tokens divided equally among towers: {config.data.places} is missing"
        return config, (1,) * model.num_towers, note
    tokens = tokens_of_towers(config.model, tokens_per_modality)
    parts = zip(config.model.tower_names, tokens, strict=True)
    note = "tokens of towers: " + ", ".join(
        f"{name} {count / sum(tokens):.0%}" for name, count in parts
    )
    return config, tokens, f"{note} ({config.data.places})"


def report(fitting: Sequence[Plan], notes: Sequence[str], memory: float) -> str:
    """Return the tables of the layouts that fit, one per kind of recomputation."""
    lines = [
        *notes,
        f"{len(fitting)} layouts fit in {memory / GB:g} GB; memory below is in GB on the fullest"
        " rank",
        "(act, select, full: activations without, with selective and with full recompute;"
        " tokens: per rank and step;",
        " need: on the device; start, resume: on the host, to start and to continue from a"
        " checkpoint)",
    ]
    shown = fitting[:LISTED]
    for mode, title in MODES.items():
        layouts = [layout for layout in shown if layout.recompute_for(memory) == mode]
        if layouts:
            lines += [f"{title}:", HEAD, *(line(layout, memory) for layout in layouts)]
    if len(fitting) > LISTED:
        lines.append(f"... and {len(fitting) - LISTED} more in this order (--json lists all)")
    return "\n".join(lines)


def line(layout: Plan, memory: float) -> str:
    """Return the table row of a layout, with the columns of HEAD."""
    sizes = layout_columns(layout.config.parallel)
    sizes += f"{layout.mesh.data:5}{layout.accumulation:6}{layout.tokens:10,}"
    state = layout.state
    values = [state.gradients, state.optimizer, *layout.activations.values()]
    values.append(layout.needed[layout.recompute_for(memory) or "full"])
    columns = f"{state.weights / GB:9.3f}" + "".join(f"{value / GB:8.3f}" for value in values)
    return f"{sizes}{columns}{layout.host.start / GB:7.1f}{layout.host.resume / GB:7.1f}"


def as_dict(layout: Plan, memory: float) -> dict[str, Any]:
    """Return a layout for JSON, with memory in bytes."""
    state = layout.state
    shares = None if layout.placement is None else layout.placement.shares
    return {
        "parallel": layout.config.parallel.model_dump(mode="json", exclude_none=True),
        "placement": shares,
        "data_parallel_size": layout.mesh.data,
        "accumulation_steps": layout.accumulation,
        "tokens_per_rank_and_step": layout.tokens,
        "weights": state.weights,
        "gradients": state.gradients,
        "optimizer": state.optimizer,
        "in_host_memory": state.host,
        "activations": dict(layout.activations),
        "needed": dict(layout.needed),
        "host_to_start": layout.host.start,
        "host_to_resume": layout.host.resume,
        "recompute": layout.recompute_for(memory),
    }


def shortfall(others: Sequence[Plan], memory: float) -> str:
    """Return how many layouts do not fit, and how much memory the closest one lacks."""
    if not others:
        return "all legal layouts fit"
    nearest = min(others, key=lambda layout: layout.needed["full"])
    missing = nearest.needed["full"] - memory
    return (
        f"{len(others)} legal layouts do not fit, even with full recompute; the closest lacks"
        f" {missing / GB:.3f} GB:\n{HEAD}\n{line(nearest, memory)}"
    )


def without_samples(config: Config) -> list[str]:
    """Return a note if logging.sample_interval_steps is set, which the list ignores."""
    interval = config.logging.sample_interval_steps
    if interval is None:
        return []
    return [
        f"ignoring logging.sample_interval_steps = {interval}: training generates no samples with"
        " pipeline or modality\nparallelism, so remove the key to use such a layout"
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``mot plan``; return the exit status."""
    return run_command(NAME, __doc__, add_arguments, run, arguments)
