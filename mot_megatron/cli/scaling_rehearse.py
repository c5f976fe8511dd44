"""Count the work and the traffic of a training step on any number of GPUs, on one CPU.

Example: mot benchmark scaling rehearse --config configs/paper/7b-mot-3.toml --world-size 16,256

This runs the project's own training step as single ranks of a large world, on PyTorch's fake
process group and tensors without values: one rank per pipeline stage and place in a modality
group. All figures are COUNTED, per rank and step: FLOPs of matrix products and attention, bytes
that other operators move, kernels, bytes of every collective by axis, and memory. They say nothing
about time.

Every sequence is one document. Its tokens are divided among the modalities by --share, or as in the
corpus, or equally if there is none. Routers are taken to give every expert as many tokens: with
expert choice they do, with top-k the largest expert of a real step has more. Operators are those of
a CPU: on a GPU, attention is a single kernel as well, but other operators may be fused.
"""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from mot_megatron.cli.arguments import add_config, add_json, positive_int
from mot_megatron.cli.command import QUIETLY_ON_CPU, print_json, run_command, say
from mot_megatron.cli.corpora import resolve_from_corpus
from mot_megatron.errors import ConfigError

if TYPE_CHECKING:
    from mot_megatron.config import Config
    from mot_megatron.scaling.roles import Rehearsed, Role

Key = TypeVar("Key", bound=Hashable)

NAME = "benchmark scaling rehearse"
PRELOAD = ["mot_megatron.scaling.rehearsal"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command line."""
    add_work(parser)
    add_json(parser)


def add_arms(parser: argparse.ArgumentParser) -> None:
    """Add ``--arms``."""
    parser.add_argument(
        "--arms",
        default="",
        metavar="NAME[,NAME...]",
        help="models to compare with, in the same layout and on the same batches: dense (the dense"
        " twin: one tower with the same FLOPs per token, without modality parallelism), moe-4x"
        " (the twin with four experts per layer), hybrid (the model with four experts per layer in"
        " the text's tower)",
    )


def add_best(parser: argparse.ArgumentParser) -> None:
    """Add ``--best``."""
    parser.add_argument(
        "--best",
        action="store_true",
        help="give every arm and number of ranks the layout that mot plan --best finds for"
        " --machine, instead of the configuration's; --micro-batches then counts those of pure data"
        " parallelism",
    )


def add_work(parser: argparse.ArgumentParser, *, is_rehearsal: bool = True) -> None:
    """Add the arguments that say what is rehearsed, or trained."""
    add_config(parser)
    parser.add_argument(
        "--world-size", required=True, metavar="N[,N...]", help="numbers of ranks (GPUs)"
    )
    parser.add_argument(
        "--micro-batches",
        type=positive_int,
        metavar="N",
        help="micro-batches per rank and step, so that the global batch grows with the ranks (weak"
        " scaling; default: training.global_batch_size for every number of ranks, strong scaling)",
    )
    parser.set_defaults(workers=None)
    parser.add_argument(
        "--share",
        action="append",
        default=[],
        metavar="NAME=SHARE",
        help="share of a modality's tokens; may be repeated (default: as in the corpus)",
    )
    if is_rehearsal:
        parser.add_argument(
            "--workers", type=positive_int, metavar="N", help="processes (default: one per core)"
        )


def run(options: argparse.Namespace) -> int:
    """Rehearse every role of every size and print the ledgers."""
    sizes = world_sizes(options.world_size)
    say(NAME, f"rehearsing {' + '.join(map(str, options.config))} on {options.world_size} ranks")
    os.environ.update(QUIETLY_ON_CPU)
    config, shares = resolve(options)
    found = rehearse_sizes(configs_of(config, sizes, options), shares, options.workers)
    if options.json:
        print_json(
            {str(size): [each.document() for each in roles] for size, roles in found.items()}
        )
    else:
        for size, roles in found.items():
            print("\n".join(text(size, roles)))
    return 0


def resolve(options: argparse.Namespace) -> tuple[Config, list[float]]:
    """Return the configuration and the share of the tokens of each modality.

    Raises:
        ConfigError: The configuration or a share is illegal.
    """
    from mot_megatron.config_files import load_config
    from mot_megatron.scaling.synthetic import parse_shares

    config = load_config(options.config, options.overrides)
    given = options.share
    config, tokens = resolve_from_corpus(config)
    if tokens is not None and not given:
        total = sum(tokens.values())
        given = [f"{name}={tokens[name] / total}" for name in config.model.modalities]
    shares = parse_shares(list(config.model.modalities), given)
    config.model.num_vocabulary_rows  # noqa: B018 - raises if the vocabulary is unknown
    return config, shares


def arms_at_sizes(
    config: Config,
    sizes: Sequence[int],
    options: argparse.Namespace,
    choose: Callable[[Config], Config] | None = None,
) -> dict[str, dict[int, Config]]:
    """Return the configuration of every arm and number of ranks, with equal batches.

    Args:
        config: Resolved configuration.
        sizes: Numbers of ranks.
        options: Command line with ``add_work`` and ``add_arms``.
        choose: Gives a configuration the layouts of all numbers of ranks, with their global
            batches; None for those of the configuration.

    Raises:
        ConfigError: An arm is unknown, or illegal for a number of ranks.
    """
    from mot_megatron.config_files import for_world_size
    from mot_megatron.planning.arms import arms_of
    from mot_megatron.rules import check, check_world_size

    found: dict[str, dict[int, Config]] = {}
    if choose is not None:
        for arm, each in arms_of(config, options.arms).items():
            chosen = choose(each)
            found[arm] = {size: for_world_size(chosen, size) for size in sizes}
        return found
    for size, of_size in configs_of(config, sizes, options).items():
        for arm, each in arms_of(of_size, options.arms).items():
            check(each, arm)
            check_world_size(each, size)
            found.setdefault(arm, {})[size] = each
    return found


def chooser(
    options: argparse.Namespace, sizes: Sequence[int], shares: Sequence[float]
) -> Callable[[Config], Config] | None:
    """Return how ``--best`` gives a configuration the best layouts; None without it.

    Raises:
        ConfigError: There is no machine, or its profile is wrong.
    """
    if not options.best:
        return None
    # Imported here because that module imports this one.
    from mot_megatron.cli.plan_best import machine_and_constants, with_best_layouts

    machine, fitted = machine_and_constants(options.machine)
    return partial(
        with_best_layouts,
        sizes=sizes,
        shares_of_modalities=shares,
        micro_batches=options.micro_batches,
        machine=machine,
        fitted=fitted,
    )


def configs_of(
    config: Config, sizes: Sequence[int], options: argparse.Namespace
) -> dict[int, Config]:
    """Return the configuration for every number of ranks, as ``scaling.layouts`` says.

    Raises:
        ConfigError: It is illegal for one of them.
    """
    from mot_megatron.config_files import for_world_size
    from mot_megatron.rules import check_world_size
    from mot_megatron.scaling.roles import with_micro_batches

    configs = {}
    for size in sizes:
        configs[size] = for_world_size(config, size)
        if options.micro_batches:
            parallel = configs[size].parallel
            model = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
            # If the sizes do not divide, the check below says so.
            data = max(1, size // model)
            configs[size] = with_micro_batches(configs[size], options.micro_batches, data)
        check_world_size(configs[size], size)
    return configs


def world_sizes(given: str) -> list[int]:
    """Read numbers of ranks separated by commas.

    Raises:
        ConfigError: One is not a positive number.
    """
    sizes = []
    for word in given.split(","):
        if not (word.isascii() and word.isdigit() and 0 < len(word) < 8 and int(word)):
            raise ConfigError(f"--world-size {given}: expected numbers of ranks, as in 16,64,256")
        sizes.append(int(word))
    return sizes


def rehearse_sizes(
    configs: Mapping[int, Config], shares: Sequence[float], workers: int | None = None
) -> dict[int, list[Rehearsed]]:
    """Rehearse all roles of all sizes, as ``rehearse_all``.

    Args:
        configs: Resolved configuration by number of ranks.
        shares: Share of the tokens of each modality.
        workers: Processes; None for one per core.
    """
    worlds = {size: (config, size) for size, config in configs.items()}
    return rehearse_all(worlds, shares, workers)


def rehearse_all(
    worlds: Mapping[Key, tuple[Config, int]], shares: Sequence[float], workers: int | None = None
) -> dict[Key, list[Rehearsed]]:
    """Rehearse all roles of several worlds, several at once, each in a new process.

    Args:
        worlds: Resolved configuration and number of ranks, by any key.
        shares: Share of the tokens of each modality.
        workers: Processes; None for one per core.
    """
    from concurrent.futures import ProcessPoolExecutor

    from torch.multiprocessing import get_context
    from tqdm import tqdm

    from mot_megatron.scaling.roles import roles_of

    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    count = workers or os.cpu_count() or 1
    with ProcessPoolExecutor(count, mp_context=context, max_tasks_per_child=1) as pool:
        running = {
            (key, role): pool.submit(_rehearse, config, size, role, shares)
            for key, (config, size) in worlds.items()
            for role in roles_of(config, size)
        }
        bar = tqdm(running.items(), "roles", ncols=100, leave=False, disable=None)
        found: dict[Key, list[Rehearsed]] = {key: [] for key in worlds}
        try:
            for (key, _), future in bar:
                found[key].append(future.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return found


def _rehearse(config: Config, size: int, role: Role, shares: Sequence[float]) -> Rehearsed:
    """Rehearse a role; runs in a process of its own."""
    from mot_megatron.scaling.roles import rehearse_role

    # DeepSpeed collects garbage several times when it starts, which takes 0.4 s each time with the
    # half million objects of the imported packages.
    gc.freeze()
    os.environ.update(
        RANK=str(role.rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="1",
    )
    return rehearse_role(config, size, role, shares)


def text(size: int, roles: Sequence[Rehearsed]) -> list[str]:
    """Return the ledgers of one size, one block per role."""
    from mot_megatron.scaling.ledger import traffic_by_axis

    lines = []
    for each in roles:
        role, ledger = each.role, each.ledger
        memory = ledger.memory
        lines += [
            "",
            f"{size} ranks: stage {role.stage}, place {role.modality_rank} in the modality group"
            f" (rank {role.rank}), per step of {ledger.micro_batches} micro-batches, all COUNTED",
            f"  memory: {memory.state / 1e9:.2f} GB before the step; at most"
            f" {memory.peak_on_gpu / 1e9:.2f} GB on a GPU, {memory.peak / 1e9:.2f} GB on a CPU"
            f" ({memory.peak_part})",
            f"  {'part':12}{'matrix TFLOP':>14}{'attention TFLOP':>17}{'other GB':>12}"
            f"{'kernels':>10}",
        ]
        lines += [
            f"  {part:12}{work.product_flops / 1e12:14.4f}{work.attention_flops / 1e12:17.4f}"
            f"{work.memory_bytes / 1e9:12.3f}{work.launches:10}"
            for part, work in ledger.tally.work.items()
        ]
        towers = ", ".join(f"{name} {n / 1e12:.4f}" for name, n in ledger.tower_flops.items())
        lines.append(f"  of the matrix TFLOP, by tower and without recomputation: {towers}")
        lines.append(f"  {'part':12}{'collective':16}{'axis':16}{'ranks':>6}{'times':>8}{'MB':>14}")
        lines += [
            f"  {part:12}{kind:16}{axis:16}{ranks:6}{count:8}{total / 1e6:14.3f}"
            for (part, kind, axis, ranks), (count, total) in traffic_by_axis(
                ledger.tally.traffic
            ).items()
        ]
    seconds = sum(each.seconds for each in roles)
    peak = max(each.host_bytes for each in roles)
    return [*lines, f"  counted in {seconds:.1f} s of one core with {peak / 1e9:.2f} GB of memory"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``mot benchmark scaling rehearse``; return the exit status."""
    return run_command(NAME, __doc__, add_arguments, run, arguments)
