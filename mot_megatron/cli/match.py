"""Match steps: the fraction of a baseline's steps, FLOPs and seconds that candidates need.

The first run belongs to the baseline. Runs whose configurations differ only in run.seed are seeds
of one arm, in any order. A slope of 0.5 means that the candidate reaches the same loss in half the
steps. A slope describes only the range reached: the part of the baseline's training whose losses
the candidate reaches at all.

Example: mot match runs/dense-* runs/mot-* --output matched
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mot_megatron.cli.arguments import add_json, add_output, user_path
from mot_megatron.cli.command import print_json, run_command, say
from mot_megatron.errors import DataError

if TYPE_CHECKING:
    from mot_megatron.compare.curves import Axis, RunCurves, Split
    from mot_megatron.compare.step_matching import Match

NAME = "match"
_AXIS_TITLES: dict[Axis, str] = {"steps": "steps", "flops": "FLOPs", "seconds": "seconds"}
_HEADER = (
    f"{'arm':<28} {'modality':<9} {'in':<7} {'slope':>6} {'95% interval':>15} {'last':>6}"
    f" {'reached':>7} {'points':>6} {'dropped':>7} {'unreached':>9} {'seeds':>5}"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command line."""
    parser.add_argument(
        "runs",
        type=user_path,
        nargs="+",
        metavar="RUN",
        help="folders of runs, or CSV files of their curves; first a run of the baseline",
    )
    add_output(parser, "folder for slopes.json, plots and tensorboard/", required=False)
    parser.add_argument(
        "--axis",
        choices=tuple(_AXIS_TITLES),
        default="steps",
        help="axis of the plots (default: steps)",
    )
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Print the tables, and write slopes and plots if an output folder is given."""
    say(NAME, f"reading {len(options.runs)} runs")

    from tqdm import tqdm

    from mot_megatron.compare.curves import group_seeds, warnings
    from mot_megatron.compare.step_matching import splits_of

    paths = tqdm(options.runs, "reading", delay=5, ncols=100, leave=False, disable=None)
    arms = group_seeds([read(path) for path in paths])
    if len(arms) < 2:
        raise DataError(
            f"{options.runs[0]}: all runs are seeds of one arm; expected another arm to match"
        )
    matches = match_all(arms)
    cautions = warnings([run for runs in arms.values() for run in runs])
    if not options.json:
        print("\n\n".join(table(matches, split, arms) for split in splits_of(matches)))
        if cautions:
            print("\nwarnings:", *cautions, sep="\n")
    written = write_all(arms, matches, options.axis, options.output) if options.output else []
    if options.json:
        results = [match.to_json() for match in matches]
        print_json({"matches": results, "warnings": cautions, "written": list(map(str, written))})
    elif written:
        print("", *(f"wrote {path}" for path in written), sep="\n")
    return 0


def read(path: Path) -> RunCurves:
    """Read the curves of a run from its folder or from a CSV file."""
    from mot_megatron.compare.curves import read_csv, read_run

    return read_csv(path) if path.suffix == ".csv" else read_run(path)


def match_all(arms: Mapping[str, Sequence[RunCurves]]) -> list[Match]:
    """Match every other arm against the first."""
    from mot_megatron.compare.step_matching import match_arms

    (_, baseline), *candidates = arms.items()
    return [match for name, runs in candidates for match in match_arms(baseline, runs, name=name)]


def table(matches: Sequence[Match], split: Split, arms: Mapping[str, Sequence[RunCurves]]) -> str:
    """Return the matches of one split as a table with a line per arm, modality and axis.

    The table is at most 120 columns wide. Column "last" is tau / t at the last point reached.
    """
    from mot_megatron.compare.curves import SPLIT_TITLES
    from mot_megatron.compare.words import at_its_best, number

    baseline = next(iter(arms))
    found = [match for match in matches if match.split == split]
    first = found[0]
    lines = [
        f"{SPLIT_TITLES[split]}: steps of {baseline}"
        f" ({first.baseline_seeds} seed{'s' if first.baseline_seeds > 1 else ''}) matched, and its"
        " FLOPs and seconds:",
        _HEADER,
    ]
    for match in found:
        interval = "-" if match.interval is None else "{:.3f} to {:.3f}".format(*match.interval)
        lines.append(
            f"{_cut(match.arm, 28):<28} {_cut(match.modality, 9):<9} {_AXIS_TITLES[match.axis]:<7}"
            f" {number(match.slope):>6} {interval:>15} {number(match.end_point_ratio):>6}"
            f" {match.range_reached:>7.1%} {match.points:>6} {match.dropped:>7}"
            f" {match.unreached:>9} {match.seeds:>5}"
        )
    of_modality = {match.modality: match for match in found if match.axis == "steps"}
    lines += [
        f"{modality}: {at_its_best(match, _cut(baseline, 22))}"
        for modality, match in of_modality.items()
        if match.baseline_overfits
    ]
    if split != "held_out_causal":
        lines += [
            f"{_cut(name, 22)}: its routing looked at later tokens, which may flatter this loss"
            for name, runs in arms.items()
            if runs[0].identity.sees_the_future
        ]
    return "\n".join(lines)


def write_all(
    arms: Mapping[str, Sequence[RunCurves]], matches: Sequence[Match], axis: Axis, output: Path
) -> list[Path]:
    """Write slopes.json, and the plots as PNG files and to tensorboard/; return the paths.

    Raises:
        DataError: A file cannot be written.
    """
    from mot_megatron.compare.match_files import draw_all, write_matches

    paths = write_matches(matches, draw_all(arms, matches, axis), output)
    return [*paths, output / "tensorboard"]


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``mot match``; return the exit status."""
    return run_command(NAME, __doc__, add_arguments, run, arguments)
