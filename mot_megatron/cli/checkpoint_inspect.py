"""Show what a checkpoint contains, or compare two.

Example: mot checkpoint inspect runs/small
Example: mot checkpoint inspect runs/small/checkpoints/step_00000014 runs/small

The checkpoint is verified first: the size and SHA-256 of every file. A damaged one is an error that
names the file. With one checkpoint, the command prints step, tokens, layout, data position and the
tensors by component and by layer and tower. With two, it prints which tensors differ and by how
much: the largest difference of an element, and the norm of the difference relative to the norm of
the first.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mot_megatron.cli.arguments import (
    CHECKPOINT_HELP,
    add_json,
    add_overrides,
    positive_int,
    user_path,
)
from mot_megatron.cli.command import print_json, run_command, say
from mot_megatron.errors import ConfigError

if TYPE_CHECKING:
    from mot_megatron.conversion.source import CheckpointSource

NAME = "checkpoint inspect"
_DIFFERENCES_SHOWN = 20
_STATISTICS = ("min", "max", "mean", "std", "zeros", "not_finite")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command line."""
    parser.add_argument(
        "paths", type=user_path, nargs="+", metavar="PATH", help=f"one or two: {CHECKPOINT_HELP}"
    )
    parser.add_argument(
        "--config",
        type=user_path,
        action="append",
        metavar="FILE",
        help="show in which keys this configuration differs from the checkpoint's",
    )
    add_overrides(parser, "override a key of --config; may be repeated")
    parser.add_argument(
        "--statistics",
        action="append",
        default=[],
        metavar="PATTERN",
        help="statistics of the tensors whose names match, as in 'weight/*norm*'; may be repeated",
    )
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument(
        "--workers",
        type=positive_int,
        default=1,
        metavar="N",
        help="files that are verified at a time (default: 1)",
    )
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Print a description of the checkpoint, or the comparison."""
    if len(options.paths) > 2:
        raise ConfigError(
            f"{len(options.paths)} checkpoints given; allowed: one, or two to compare"
        )
    if options.overrides and not options.config:
        raise ConfigError("--set and --unset need --config")
    say(NAME, f"reading {' and '.join(map(str, options.paths))}")

    from mot_megatron.config_files import load_config
    from mot_megatron.conversion.inspection import compare, describe, statistics
    from mot_megatron.conversion.source import CheckpointSource

    sources = [CheckpointSource(path, options.workers) for path in options.paths]
    for line in (line for source in sources for line in source.skipped):
        say(NAME, f"skipped {line}")
    if len(sources) == 2:
        comparison = compare(*sources)
        print_json(comparison) if options.json else print(comparison_text(comparison))
        return 0
    (source,) = sources
    config = load_config(options.config, options.overrides) if options.config else None
    document = describe(source, config)
    found = [statistics(source, pattern) for pattern in options.statistics]
    document["statistics"] = {name: values for each in found for name, values in each.items()}
    if options.json:
        print_json(document)
        return 0
    print(text(source, document))
    if options.tensors:
        print("\n" + "\n".join(_tensor_lines(document["tensors"])))
    if document["statistics"]:
        print("\n" + "\n".join(_statistics_lines(document["statistics"])))
    return 0


def text(source: CheckpointSource, document: dict[str, Any]) -> str:
    """Return the description of one checkpoint, at most 120 columns wide but for paths."""
    progress, data = document["progress"], document["data"]
    lines = [
        document["path"],
        f"{document['contents']}, step {document['step']}; verified: {document['files']} files,"
        f" {document['bytes']:,} bytes",
        f"layout: {document['layout']}; files of {document['ranks_with_files']} ranks",
    ]
    if progress:
        seconds, tokens = progress.get("seconds", 0), progress.get("tokens", 0)
        lines.append(f"progress: {tokens:,} tokens, {seconds:,.0f} s of training")
    steps = document["optimizer_steps"]
    lines.append(f"optimizer: {'no state' if steps is None else f'{steps} steps'}")
    position = ", ".join(f"{key} {data[key]}" for key in ("epoch", "next_sequence") if key in data)
    lines.append(f"data position: {position or 'none'}")
    lines += [f"made from: {path}" for path in document["made_from"]]
    lines += ["", *_component_lines(source), "", *_place_lines(source, document["tower_names"])]
    if "config_differences" in document:
        lines += ["", *_config_lines(document["config_differences"], "checkpoint", "--config")]
    return "\n".join(lines)


def _component_lines(source: CheckpointSource) -> list[str]:
    from mot_megatron.conversion.inspection import by_component

    def line(component: str, shape: str, kinds: str, size: str) -> str:
        return f"{component:<42} {shape:<26} {kinds:<34} {size:>15}"

    lines = [line("component", "shape and dtype", "tensors", "bytes")]
    for (component, shape), group in by_component(source.infos).items():
        numbers = set(group.kinds.values())
        if len(numbers) == 1:
            kinds = f"{numbers.pop()} x {', '.join(group.kinds)}"
        else:
            kinds = ", ".join(f"{number} {kind}" for kind, number in group.kinds.items())
        lines.append(line(component, shape, kinds, f"{group.num_bytes:,}"))
    total = sum(info.num_bytes for info in source.infos.values())
    return [*lines, line("total", "", f"{len(source.infos):,}", f"{total:,}")]


def _place_lines(source: CheckpointSource, tower_names: Sequence[str]) -> list[str]:
    """Return parameters by layer and tower; equal consecutive layers share a line."""
    from mot_megatron.conversion.inspection import parameters_by_place

    places = parameters_by_place(source.infos)
    lines = []
    run: list[int] = []
    for layer in [*sorted(layer for layer in places if layer is not None), None]:
        if run and (layer is None or places[layer] != places[run[0]]):
            title = f"layer {run[0]}" if len(run) == 1 else f"layers {run[0]}-{run[-1]}, each"
            lines += _place_line(title, places[run[0]], tower_names)
            run = []
        if layer is not None:
            run.append(layer)
    if None in places:
        lines += _place_line("outside the layers", places[None], tower_names)
    return ["parameters by layer and tower", *lines]


def _place_line(title: str, counts: dict[int | None, int], names: Sequence[str]) -> list[str]:
    parts = [
        f"{'shared' if tower is None else dict(enumerate(names)).get(tower, tower)} {count:,}"
        for tower, count in sorted(
            counts.items(), key=lambda item: -1 if item[0] is None else item[0]
        )
    ]
    return [f"  {title}: {', '.join(parts)}"]


def _tensor_lines(tensors: dict[str, dict[str, Any]]) -> list[str]:
    return [
        f"{name}  {' x '.join(map(str, tensor['shape'])) or 'scalar'} {tensor['dtype']}"
        for name, tensor in tensors.items()
    ]


def _statistics_lines(found: dict[str, dict[str, Any]]) -> list[str]:
    lines = []
    for name, values in found.items():
        shown = ", ".join(f"{key.replace('_', ' ')} {values[key]:.6g}" for key in _STATISTICS)
        lines += [name, f"  {shown}"]
    return lines


def _config_lines(differences: dict[str, dict[str, Any]], first: str, second: str) -> list[str]:
    if not differences:
        return [f"configuration: {first} and {second} are equal"]
    return [
        f"configuration: {first} and {second} differ in",
        *(f"  {key}: {pair['first']!r}, {pair['second']!r}" for key, pair in differences.items()),
    ]


def comparison_text(comparison: dict[str, Any]) -> str:
    """Return the comparison of two checkpoints as text."""
    steps = comparison["steps"]
    lines = [
        f"first:  {comparison['first']}, step {steps[0]}",
        f"second: {comparison['second']}, step {steps[1]}",
    ]
    differing = comparison["values_differ"]
    lines.append(
        f"{comparison['tensors_in_both']} tensors in both, of which {len(differing)} differ in"
        f" values, {len(comparison['shapes_differ'])} in shape, {len(comparison['dtypes_differ'])}"
        " in dtype"
    )
    for key, where in (("only_in_first", "first"), ("only_in_second", "second")):
        names = comparison[key]
        if names:
            lines.append(f"{len(names)} tensors only in the {where}, such as {names[0]}")
    lines += [f"{name}: shapes {shapes}" for name, shapes in comparison["shapes_differ"].items()]
    ranked = sorted(differing.items(), key=lambda item: -item[1]["relative"])
    if ranked:
        lines += ["", f"{'relative':>10} {'largest':>10} {'elements':>13}  tensor"]
    for name, by in ranked[:_DIFFERENCES_SHOWN]:
        lines.append(
            f"{by['relative']:>10.3g} {by['largest']:>10.3g} {by['elements']:>13,}  {name}"
        )
    if len(ranked) > _DIFFERENCES_SHOWN:
        lines.append(
            f"and {len(ranked) - _DIFFERENCES_SHOWN} more, which differ less (--json: all)"
        )
    lines += ["", *_config_lines(comparison["config_differences"], "first", "second")]
    equal = "equal" if comparison["metadata_equal"] else "different"
    return "\n".join([*lines, f"progress and data position: {equal}"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``mot checkpoint inspect``; return the exit status."""
    return run_command(NAME, __doc__, add_arguments, run, arguments)
