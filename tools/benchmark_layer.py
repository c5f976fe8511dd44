"""Time one layer, forward and backward, of ours and of other ways to untie weights, beside dense.

``benchmark_layer.py [--tokens N] [--hidden N] [--device cuda] [--json] [--profile]``. Every variant
has the same active FLOPs, the same kernels and the same attention (one causal document), and works
on the same weights as ours with as many towers. Each round runs every variant once in random order;
a ratio compares a variant with dense in the same round, so a busy machine slows both.

- dense: one tower.
- mot-K: ours, K towers on contiguous slices of the stream; two permutations around attention.
- mask-K: the stream stays in sequence order and boolean masks pick each tower's rows around every
  projection, which is how the code published with the paper works.
- gather-scatter-K: the same with index select and index put by integer positions.

``--experts`` adds expert-choice-4 and top-1-of-4: dense with four experts for its feed-forward
network, of which a token runs through one (on average), so that the active FLOPs are dense's and a
router's; and expert-choice-4-causal, beside which a causal router is trained. ``--exchange`` adds
exchange-sequence and exchange-heads: what one of a pair of modality-parallel ranks does to q, k, v
and the output, without sending them. ``--compile`` adds dense and ours through torch.compile
(minutes, on a CPU).

``benchmark_layer.py --ranks 2`` times a pair of ranks instead, each with a sequence of its own:
dense, mot-2 with both towers on both ranks, and mot-2-mp2 with a tower on each and q, k, v and the
output exchanged ("sequence" or "heads"); each without and with its weights' gradients summed over
the ranks that hold them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from typing import Any

import torch
from torch.multiprocessing.spawn import spawn

from mot_megatron.benchmark.layer_ranks import RANKS, PairSettings, measure_pair
from mot_megatron.benchmark.layer_variants import (
    MIXTURES,
    NUM_TOWERS,
    Benchmark,
    Variant,
    measure,
    profile_difference,
    spread,
)
from mot_megatron.errors import UserError
from mot_megatron.job.hardware import describe_machine
from mot_megatron.parallel.groups import build_single_process_groups

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=_positive, default=4096, help="default 4096")
    parser.add_argument("--hidden", type=_positive, default=1024, help="default 1024")
    parser.add_argument("--heads", type=_positive, default=16, help="default 16")
    parser.add_argument("--repeats", type=_positive, default=10, help="rounds (default 10)")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="default fp32")
    parser.add_argument("--threads", type=_positive, help="CPU threads (default: torch's)")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="wall (default), or processor time of this process, for CPUs that others use too",
    )
    parser.add_argument(
        "--ranks", type=int, choices=(1, RANKS), default=1, help="2: modality parallelism on a pair"
    )
    parser.add_argument(
        "--exchange",
        action="store_true",
        help="also what modality parallelism's exchange does to its rows, without sending them",
    )
    parser.add_argument(
        "--experts", action="store_true", help="also dense with a mixture of experts"
    )
    parser.add_argument(
        "--compile", action="store_true", help="also dense and ours through torch.compile"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument(
        "--profile", action="store_true", help="print where ours spends more than dense instead"
    )
    options = parser.parse_args(arguments)
    _check_options(parser, options)
    return options


def _check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with the parser's error where options do not go together."""
    if options.repeats < 2:
        parser.error("--repeats 1: a spread needs at least 2")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: torch finds no GPU here; allowed: cpu")
    single = (
        options.profile or options.exchange or options.experts or options.compile or options.threads
    )
    if options.ranks > 1 and (single or options.clock != "wall"):
        parser.error(
            "--ranks 2 goes with wall time and a thread per rank, without --profile, --exchange,"
            " --experts and --compile"
        )
    if (
        options.ranks > 1
        and options.device.startswith("cuda")
        and torch.cuda.device_count() < RANKS
    ):
        parser.error(f"--ranks 2 --device cuda needs {RANKS} GPUs")
    if options.device != "cpu" and options.clock != "wall":
        parser.error(f"--clock {options.clock}: allowed with --device cpu only")


def _positive(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text}, expected a number above 0")
    return value


def benchmark(options: argparse.Namespace, variants: list[Variant]) -> dict[str, Any]:
    """Measure, and put the figures into the object that --json prints."""
    device = torch.device(options.device)
    return _result(options, measure(variants, options.repeats, device, CLOCKS[options.clock]))


def _result(options: argparse.Namespace, seconds: dict[str, list[float]]) -> dict[str, Any]:
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


def benchmark_pair(options: argparse.Namespace) -> dict[str, Any]:
    """Measure two ranks of one thread each (on GPUs: one each)."""
    settings = PairSettings(
        options.tokens,
        options.hidden,
        options.heads,
        options.repeats,
        options.device,
        DTYPES[options.dtype],
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


def show(result: dict[str, Any]) -> None:
    """Print what --json prints as a table for people."""
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


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    options = parse_arguments(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        result = benchmark_pair(options) if options.ranks > 1 else _benchmark_alone(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if isinstance(result, str):
        print(result)
    elif options.json:
        print(json.dumps(result))
    else:
        show(result)
    return 0


def _benchmark_alone(options: argparse.Namespace) -> dict[str, Any] | str:
    """The figures of one process, or with --profile the profile's text."""
    device = torch.device(options.device)
    dtype, groups = DTYPES[options.dtype], build_single_process_groups(device)
    setting = Benchmark(options.tokens, options.hidden, options.heads, device, dtype, groups)
    variants = setting.variants()
    if options.experts:
        variants += setting.mixtures()
    if options.exchange:
        variants += [setting.exchange_permutations(kind) for kind in ("sequence", "heads")]
    if options.compile:
        variants += setting.compiled()
    if not options.profile:
        return benchmark(options, variants)
    by_name = {variant.name: variant for variant in variants}
    ours = [f"mot-{num_towers}" for num_towers in NUM_TOWERS]
    return "\n".join(
        profile_difference(by_name["dense"], by_name[name], device)
        for name in [*ours, *(MIXTURES if options.experts else ())]
    )


if __name__ == "__main__":
    sys.exit(main())
