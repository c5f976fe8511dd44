"""How fast a machine is: single rates, layers, whole steps, and what single switches change."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from mot_megatron.benchmark.layer_variants import MIXTURES, Benchmark, measure, spread
from mot_megatron.config import Config
from mot_megatron.config_files import load_config
from mot_megatron.job.hardware import peak_flops
from mot_megatron.machine_check.checks import TIMES_SUFFIX, Context
from mot_megatron.machine_check.jobs import JobError, timed_job
from mot_megatron.machine_check.outcome import Outcome
from mot_megatron.parallel.groups import build_single_process_groups
from mot_megatron.scaling.calibrate import (
    attention_rate,
    launch_seconds,
    matrix_rate,
    memory_rate,
)

LOWEST_MATRIX_SHARE = 0.5
"""Share of the data sheet's peak that large matrix products reach on a healthy GPU, at least."""
LONGEST_LAUNCH_SECONDS = 8e-6
"""Most time of the host to start an operator; a usual server needs 3 to 5 microseconds."""
HIGHEST_RATIO = 1.25
"""Most time of a layer with three towers over that of the dense one."""
FASTER = 0.95
"""A switch that lowers the time of a step to this share is worth setting."""
_WARMUP_STEPS, _STEPS = 3, 8


def rates(context: Context, *, config: str, overrides: Sequence[str]) -> Outcome:
    """Measure matrix products, attention, memory and the start of operators on one device."""
    settings = load_config(context.configs / config, list(overrides))
    device = torch.device(context.device)
    precision = settings.training.precision
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    found = {
        "matrix_flops_per_second": matrix_rate(settings, device, dtype),
        "attention_flops_per_second": attention_rate(settings, device, dtype),
        "memory_bytes_per_second": memory_rate(device),
        "launch_seconds": launch_seconds(device),
    }
    share = found["matrix_flops_per_second"] / peak_flops(device, precision)
    seen = (
        f"{precision}: matrix products {found['matrix_flops_per_second'] / 1e12:.2f} TFLOP/s,"
        f" attention {found['attention_flops_per_second'] / 1e12:.2f} TFLOP/s, memory"
        f" {found['memory_bytes_per_second'] / 1e9:.0f} GB/s,"
        f" {1e6 * found['launch_seconds']:.1f} us per operator"
    )
    if not context.on_gpu:
        return Outcome("PASS", seen, "", found)
    seen += f"; {share:.0%} of the peak"
    advice = []
    if share < LOWEST_MATRIX_SHARE:
        advice.append("clocks are low or the GPU is shared: look at nvidia-smi -q -d PERFORMANCE")
    if found["launch_seconds"] > LONGEST_LAUNCH_SECONDS:
        advice.append(
            "the host starts operators slowly, which binds small models: look for other load and"
            " the CPU's governor, and use larger micro-batches"
        )
    return Outcome("SLOW" if advice else "PASS", seen, "; ".join(advice), found)


def layer(
    context: Context, *, tokens: int, hidden: int, heads: int, repeats: int, experts: bool = False
) -> Outcome:
    """Time one layer with its backward: dense, two and three towers; with experts, mixtures."""
    seconds, name = _layer_seconds(context, tokens, hidden, heads, repeats, experts)
    dense = seconds["dense"]
    ratios = {
        variant: spread([a / b for a, b in zip(values, dense, strict=True)])["median"]
        for variant, values in seconds.items()
        if variant != "dense"
    }
    milliseconds = 1e3 * statistics.median(dense)
    shown = ", ".join(f"{variant} {ratio:.2f}" for variant, ratio in ratios.items())
    seen = (
        f"{tokens} tokens, hidden {hidden}, {name}: dense {milliseconds:.2f} ms; over it: {shown}"
    )
    numbers = {"seconds": {variant: spread(values) for variant, values in seconds.items()}}
    numbers |= {"ratio_to_dense": ratios}
    if context.on_gpu and not experts and ratios["mot-3"] > HIGHEST_RATIO:
        advice = (
            f"above {HIGHEST_RATIO}: the start of operators binds; use more tokens per micro-batch,"
            " and see mot benchmark layer --profile"
        )
        return Outcome("SLOW", seen, advice, numbers)
    return Outcome("PASS", seen, "", numbers)


def _layer_seconds(
    context: Context, tokens: int, hidden: int, heads: int, repeats: int, experts: bool
) -> tuple[dict[str, list[float]], str]:
    device = torch.device(context.device)
    dtype = torch.bfloat16 if context.on_gpu else torch.float32
    setting = Benchmark(tokens, hidden, heads, device, dtype, build_single_process_groups(device))
    variants = [setting.ours(1, "dense")]
    if experts:
        variants += setting.mixtures()
    else:
        variants += [setting.ours(towers, f"mot-{towers}") for towers in (2, 3)]
    return measure(variants, repeats, device, time.perf_counter), str(dtype).removeprefix("torch.")


def repeatability(context: Context, *, tokens: int, hidden: int, heads: int) -> Outcome:
    """Run layers twice and compare outputs and gradients bit by bit.

    Only what repeats can be continued from a checkpoint to the same numbers.
    """
    device = torch.device(context.device)
    dtype = torch.bfloat16 if context.on_gpu else torch.float32
    setting = Benchmark(tokens, hidden, heads, device, dtype, build_single_process_groups(device))
    variants = [setting.ours(1, "dense"), setting.ours(3, "mot-3"), *setting.mixtures()]
    different = []
    for variant in variants:
        runs = []
        for _ in range(3):
            variant.clear()
            outputs = variant.step()
            gradients = [p.grad for p in (*variant.layer.parameters(), *variant.inputs)]
            runs.append([t.detach().clone() for t in (*outputs, *gradients) if t is not None])
        same = all(
            torch.equal(one, other)
            for run in runs[1:]
            for one, other in zip(runs[0], run, strict=True)
        )
        different += [] if same else [variant.name]
    if not different:
        return Outcome("PASS", f"bit by bit: {', '.join(v.name for v in variants)}")
    seen = f"not bit by bit: {', '.join(different)}"
    advice = "a run that is continued from a checkpoint differs by rounding from one that was not"
    if set(different) <= set(MIXTURES):
        return Outcome("PASS", seen, advice)
    return Outcome("FAIL", seen, f"{advice}; without experts it should not")


def step(
    context: Context,
    *,
    config: str,
    overrides: Sequence[str],
    world_size: int = 1,
    memory_gb: float = 0.0,
    lowest_mfu: float = 0.0,
) -> Outcome:
    """Time whole training steps on synthetic batches.

    Args:
        context: The machine.
        config: Configuration, relative to the shipped ones.
        overrides: Its overrides.
        world_size: Number of ranks.
        memory_gb: Device memory that it needs.
        lowest_mfu: Share of the peak FLOP/s below which it is slow; GPUs only.
    """
    if context.on_gpu:
        memory = torch.cuda.get_device_properties(0).total_memory / 1e9
        if memory < memory_gb:
            seen = f"needs {memory_gb:.0f} GB of device memory, there are {memory:.0f}"
            return Outcome("SKIPPED", seen)
    name = _name("step", config, overrides, world_size)
    try:
        record = _timed(context, name, config, overrides, world_size)
    except JobError as error:
        return Outcome("FAIL", str(error), "read the job's log in logs/")
    found = figures(record)
    seen = describe(found)
    if context.on_gpu and found["mfu"] < lowest_mfu:
        advice = (
            f"below {lowest_mfu:.0%}: compare with the rates of this device; then look at"
            " training.profile_steps for waits of the host"
        )
        return Outcome("SLOW", seen, advice, found)
    return Outcome("PASS", seen, "", found)


def switch(
    context: Context,
    *,
    config: str,
    base: Sequence[str],
    overrides: Sequence[str] = (),
    variables: Mapping[str, str] | None = None,
    advice: str = "",
) -> Outcome:
    """Time steps with a switch on and off; the base is measured once for all switches.

    Args:
        context: The machine.
        config: Configuration, relative to the shipped ones.
        base: Overrides of the base.
        overrides: Overrides that the switch adds.
        variables: Environment variables that it sets.
        advice: What to do if it makes steps faster; empty if it is a trade against something else.
    """
    base_name = _name("step", config, base, 1)
    base_file = context.file(f"{base_name}{TIMES_SUFFIX}")
    try:
        if base_file.exists():
            without = json.loads(base_file.read_text())
        else:
            without = _timed(context, base_name, config, base, 1)
        changed = replace(context, environment={**context.environment, **(variables or {})})
        name = _name("switch", config, [*overrides, *(variables or {}).values()], 1)
        with_it = _timed(changed, name, config, [*base, *overrides], 1)
    except JobError as error:
        return Outcome("FAIL", str(error), "read the job's log in logs/")
    one, other = figures(without), figures(with_it)
    ratio = other["seconds"] / one["seconds"]
    memory = other["peak_memory_bytes"] / one["peak_memory_bytes"]
    seen = (
        f"{1e3 * one['seconds']:.1f} ms without, {1e3 * other['seconds']:.1f} ms with: time"
        f" x {ratio:.3f}, memory x {memory:.2f}"
    )
    numbers = {"without": one, "with": other, "ratio": ratio, "memory_ratio": memory}
    # Other load slows single steps; the fastest ones must agree.
    if advice and max(ratio, other["fastest_seconds"] / one["fastest_seconds"]) < FASTER:
        return Outcome("SLOW", f"without it, slower: {seen}", advice, numbers)
    return Outcome("PASS", seen, "", numbers)


def figures(record: Mapping[str, Any]) -> dict[str, float]:
    """Return what a record of timed steps says, from its steps after the warm-up."""
    seconds = record["step_seconds"][_WARMUP_STEPS:]
    median = statistics.median(seconds)
    flops = statistics.mean(record["flops"][_WARMUP_STEPS:])
    return {
        "seconds": median,
        "fastest_seconds": min(seconds),
        "slowest_seconds": max(seconds),
        "tokens_per_second": record["positions"] / median,
        "mfu": flops / median / record["peak_flops_per_second"],
        "peak_memory_bytes": record["peak_memory_bytes"],
    }


def describe(found: Mapping[str, float]) -> str:
    """Return figures in words."""
    return (
        f"{1e3 * found['seconds']:.1f} ms per step ({1e3 * found['fastest_seconds']:.1f} to"
        f" {1e3 * found['slowest_seconds']:.1f}), {found['tokens_per_second']:,.0f} tokens/s, MFU"
        f" {found['mfu']:.1%}, {found['peak_memory_bytes'] / 1e9:.1f} GB"
    )


def _timed(
    context: Context, name: str, config: str, overrides: Sequence[str], world_size: int
) -> dict[str, Any]:
    steps = f"training.train_steps={_WARMUP_STEPS + _STEPS}"
    settings: Config = load_config(context.configs / config, [*overrides, steps])
    names = list(settings.model.modalities)
    shares = ",".join(f"{each}={1 / len(names)!r}" for each in names)
    return timed_job(context, name, settings, world_size, shares)


def _name(kind: str, config: str, overrides: Sequence[str], world_size: int) -> str:
    words = [kind, config.removesuffix(".toml"), *(o.rpartition(".")[2] for o in overrides)]
    text = "-".join([*words, str(world_size)])
    return "".join(c if c.isalnum() or c == "." else "-" for c in text)
