"""Time forward and backward of one layer: dense, ours, and other ways to untie weights.

All variants have the same active FLOPs, kernels and attention (one causal document), and variants
with the same number of towers have the same weights. Every round runs each variant once, in random
order. Ratios compare a variant with dense in the same round, so that other load on the machine
slows both.

- dense: one tower.
- mot-K: ours, K towers on contiguous slices of the stream; two permutations around attention.
- mask-K: the stream stays in sequence order, and boolean masks select each tower's rows around
  every projection, as in the code published with the paper.
- gather-scatter-K: the same, but with index select and index put by integer positions.

--experts adds expert-choice-4 and top-1-of-4: dense with four experts as its feed-forward network.
Every token uses one of them (on average), so the active FLOPs are those of dense plus the router.
It also adds expert-choice-4-causal, which also trains a causal router. --exchange adds
exchange-sequence and exchange-heads: what one of two modality-parallel ranks does to q, k, v and
the output, without the communication.

--fused BACKEND adds dense and ours with fused operations, as model.layer_backend = BACKEND selects
them, and mot-3 with each of these operations alone. --compile adds dense and ours with
torch.compile of whole layers. Compilation takes minutes on a CPU.

--world-size 2 times a pair of ranks instead, each with its own sequence: dense, mot-2 with both
towers on both ranks, and mot-2-mp2 with one tower on each rank, exchanging q, k, v and the output
("sequence" or "heads"). Each is timed without and with the reduction of gradients over the ranks
that hold the weights.

Example: mot benchmark layer --tokens 2048 --hidden 1024 --device cuda
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mot_megatron.cli.arguments import add_json, positive_int
from mot_megatron.cli.command import print_json, run_command, say
from mot_megatron.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from mot_megatron.benchmark.layer_variants import Variant

NAME = "benchmark layer"
PAIR = 2
"""Number of ranks in the modality-parallel benchmark."""
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command line."""
    parser.add_argument("--tokens", type=positive_int, default=4096, help="default 4096")
    parser.add_argument("--hidden", type=positive_int, default=1024, help="default 1024")
    parser.add_argument("--heads", type=positive_int, default=16, help="default 16")
    parser.add_argument("--repeats", type=positive_int, default=10, help="rounds (default 10)")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="default fp32")
    parser.add_argument("--threads", type=positive_int, help="CPU threads (default: torch's)")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="wall time (default), or processor time of this process, for a shared CPU",
    )
    parser.add_argument(
        "--world-size",
        type=int,
        choices=(1, PAIR),
        default=1,
        help=f"{PAIR}: modality parallelism on two ranks",
    )
    parser.add_argument(
        "--exchange",
        action="store_true",
        help="add the exchange of modality parallelism without communication",
    )
    parser.add_argument("--experts", action="store_true", help="add dense with mixtures of experts")
    parser.add_argument(
        "--fused",
        choices=("triton", "compile"),
        help="add dense and ours with fused operations, all and one at a time",
    )
    parser.add_argument(
        "--compile", action="store_true", help="add dense and ours with torch.compile"
    )
    parser.add_argument(
        "--profile", action="store_true", help="instead, print where ours is slower than dense"
    )
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Run the benchmark and print the result."""
    check_options(options)
    say(NAME, f"{options.tokens} tokens, hidden {options.hidden}, {options.repeats} rounds")

    import torch

    check_devices(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.world_size > 1:
        result = benchmark_pair(options)
    else:
        device = torch.device(options.device)
        variants = choose_variants(options, device)
        if options.profile:
            print(profile(variants, device))
            return 0
        result = benchmark(options, variants)
    if options.json:
        print_json(result)
    else:
        show(result)
    return 0


def check_options(options: argparse.Namespace) -> None:
    """Check that the options are compatible.

    Raises:
        ConfigError: They are not.
    """
    if options.repeats < 2:
        raise ConfigError("--repeats 1: must be at least 2, to measure a spread")
    if options.profile and options.json:
        raise ConfigError("--profile prints text only; omit --json")
    added = options.exchange or options.experts or options.fused or options.compile
    single = added or options.profile or options.threads
    if options.world_size > 1 and (single or options.clock != "wall"):
        raise ConfigError(
            f"--world-size {PAIR} requires wall time and one thread per rank, and excludes"
            " --profile, --exchange, --experts, --fused and --compile"
        )
    if options.device != "cpu" and options.clock != "wall":
        raise ConfigError(f"--clock {options.clock}: allowed with --device cpu only")


def check_devices(options: argparse.Namespace) -> None:
    """Check that this machine has the GPUs that the options require.

    Raises:
        ConfigError: It does not.
    """
    import torch

    if not options.device.startswith("cuda"):
        return
    if not torch.cuda.is_available():
        raise ConfigError(f"--device {options.device}: torch finds no GPU; allowed: cpu")
    if torch.cuda.device_count() < options.world_size:
        raise ConfigError(f"--world-size {PAIR} --device cuda needs {PAIR} GPUs")


def choose_variants(options: argparse.Namespace, device: torch.device) -> list[Variant]:
    """Build the variants that the options select."""
    import torch

    from mot_megatron.benchmark.layer_variants import Benchmark
    from mot_megatron.parallel.groups import build_single_process_groups

    dtype, groups = getattr(torch, DTYPES[options.dtype]), build_single_process_groups(device)
    setting = Benchmark(options.tokens, options.hidden, options.heads, device, dtype, groups)
    variants = setting.variants()
    if options.experts:
        variants += setting.mixtures()
    if options.exchange:
        variants += [setting.exchange_permutations(kind) for kind in ("sequence", "heads")]
    if options.fused is not None:
        variants += setting.fused(options.fused)
    if options.compile:
        variants += setting.compiled()
    return variants


def benchmark(options: argparse.Namespace, variants: list[Variant]) -> dict[str, Any]:
    """Measure in this process and return the result, ready for JSON."""
    import torch

    from mot_megatron.benchmark.layer_variants import measure

    device = torch.device(options.device)
    return _result(options, measure(variants, options.repeats, device, CLOCKS[options.clock]))


def profile(variants: list[Variant], device: torch.device) -> str:
    """Return where our layers, and mixtures if there are any, take longer than dense."""
    from mot_megatron.benchmark.layer_variants import MIXTURES, NUM_TOWERS, profile_difference

    by_name = {variant.name: variant for variant in variants}
    ours = [f"mot-{num_towers}" for num_towers in NUM_TOWERS]
    mixtures = [name for name in MIXTURES if name in by_name]
    return "\n".join(
        profile_difference(by_name["dense"], by_name[name], device) for name in [*ours, *mixtures]
    )


def benchmark_pair(options: argparse.Namespace) -> dict[str, Any]:
    """Measure two ranks with one thread each (on GPUs, with one GPU each)."""
    import torch
    from torch.multiprocessing.spawn import spawn

    from mot_megatron.benchmark.layer_ranks import RANKS, PairSettings, measure_pair
    from mot_megatron.benchmark.layer_variants import spread

    settings = PairSettings(
        options.tokens,
        options.hidden,
        options.heads,
        options.repeats,
        options.device,
        getattr(torch, DTYPES[options.dtype]),
    )
    with tempfile.TemporaryDirectory() as folder:
        spawn(measure_pair, (folder, settings), nprocs=RANKS)
        seconds: dict[str, list[float]] = torch.load(f"{folder}/seconds.pt")
    return _result(options, seconds) | {
        "ranks": RANKS,
        "tokens_per_second_of_the_pair": {
            name: spread([RANKS * options.tokens / value for value in values])
            for name, values in seconds.items()
        },
    }


def _result(options: argparse.Namespace, seconds: dict[str, list[float]]) -> dict[str, Any]:
    import torch

    from mot_megatron.benchmark.layer_variants import spread
    from mot_megatron.job.hardware import describe_machine

    dense = seconds["dense"]
    return {
        "benchmark": "layer",
        "tokens": options.tokens,
        "hidden": options.hidden,
        "heads": options.heads,
        "dtype": options.dtype,
        "device": options.device,
        "clock": options.clock,
        "repeats": options.repeats,
        "spread": "quartiles of the rounds",
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "ratio_to_dense": {
            name: spread([a / b for a, b in zip(values, dense, strict=True)])
            for name, values in seconds.items()
        },
        "machine": describe_machine(torch.device(options.device)),
    }


def show(result: dict[str, Any]) -> None:
    """Print the result as a table."""
    ranks = f" on each of {result['ranks']} ranks" if "ranks" in result else ""
    print(
        f"one layer, forward + backward: {result['tokens']} tokens{ranks}, "
        f"hidden {result['hidden']}, {result['dtype']} on {result['device']}, "
        f"{result['repeats']} rounds, {result['clock']} time"
    )
    width = max(map(len, result["seconds"]))
    print(f"{'variant':{width}} {'ms':>9} {'ratio to dense':>15}  (quartiles)")
    for name, ratio in result["ratio_to_dense"].items():
        milliseconds = 1e3 * result["seconds"][name]["median"]
        print(
            f"{name:{width}} {milliseconds:9.2f} {ratio['median']:15.3f}"
            f"  ({ratio['low']:.3f}..{ratio['high']:.3f})"
        )
    print("machine: " + ", ".join(f"{key} {value}" for key, value in result["machine"].items()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``mot benchmark layer``; return the exit status."""
    return run_command(NAME, __doc__, add_arguments, run, arguments)
