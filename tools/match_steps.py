"""Match steps: what part of a baseline's steps, FLOPs and seconds candidates need for its losses.

The first run is of the baseline; runs that differ in run.seed only are seeds of one arm, in any
order. A slope of 0.5 is half the steps. The range reached is the part of the baseline's training
whose losses the candidate comes to at all: a slope speaks of that part alone.

Example: match_steps.py runs/dense-* runs/mot-* --output matched
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from mot_megatron.compare.curves import (
    AXES,
    SPLIT_TITLES,
    Axis,
    RunCurves,
    Split,
    group_seeds,
    read_csv,
    read_run,
    warnings,
)
from mot_megatron.compare.match_files import draw_all, write_matches
from mot_megatron.compare.step_matching import Match, match_arms, splits_of
from mot_megatron.compare.words import at_its_best, number
from mot_megatron.errors import DataError, UserError

_AXIS_TITLES: dict[Axis, str] = {"steps": "steps", "flops": "FLOPs", "seconds": "seconds"}
_HEADER = (
    f"{'arm':<28} {'modality':<9} {'in':<7} {'slope':>6} {'95% interval':>15} {'last':>6}"
    f" {'reached':>7} {'points':>6} {'dropped':>7} {'unreached':>9} {'seeds':>5}"
)


def read(path: Path) -> RunCurves:
    """The curves of a run's folder, or those kept of one in a CSV."""
    return read_csv(path) if path.suffix == ".csv" else read_run(path)


def match_all(arms: Mapping[str, Sequence[RunCurves]]) -> list[Match]:
    """Every arm but the first against the first."""
    (_, baseline), *candidates = arms.items()
    return [match for name, runs in candidates for match in match_arms(baseline, runs, name=name)]


def table(matches: Sequence[Match], split: Split, arms: Mapping[str, Sequence[RunCurves]]) -> str:
    """The matches of one split as a person reads them, a line per arm, modality and axis.

    At most 120 columns wide; last is tau / t at the last point that is reached.
    """
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
) -> None:
    """Write slopes.json, and the plots as PNG and into tensorboard/.

    Raises:
        DataError: one cannot be written.
    """
    paths = write_matches(matches, draw_all(arms, matches, axis), output)
    for path in (*paths, output / "tensorboard"):
        print(f"wrote {path}")


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def main(arguments: list[str] | None = None) -> int:
    """Print the tables and write what was asked for; 2 after bad input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("baseline", type=Path, metavar="RUN_DENSE", help="folder of a run, or CSV")
    parser.add_argument(
        "candidates", type=Path, nargs="+", metavar="RUN", help="more seeds, and the candidates"
    )
    parser.add_argument("--output", type=Path, help="folder for slopes.json, plots, tensorboard/")
    parser.add_argument(
        "--axis", choices=AXES, default="steps", help="of the plots (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    try:
        paths = tqdm(
            (options.baseline, *options.candidates), "reading", delay=5, ncols=100, leave=False
        )
        arms = group_seeds([read(path) for path in paths])
        if len(arms) < 2:
            raise DataError(
                f"{options.baseline}: all runs are seeds of one arm, expected another arm to match"
            )
        matches = match_all(arms)
        print("\n\n".join(table(matches, split, arms) for split in splits_of(matches)))
        cautions = warnings([run for runs in arms.values() for run in runs])
        if cautions:
            print("\nto bear in mind:", *cautions, sep="\n")
        if options.output:
            print()
            write_all(arms, matches, options.axis, options.output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
