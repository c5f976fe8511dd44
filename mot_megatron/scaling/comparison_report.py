"""The report of a comparison, made of what is kept of its runs: Markdown, plots and slopes.json."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from mot_megatron.errors import DataError
from mot_megatron.model.flops import active_flops_per_token, count_parameters
from mot_megatron.scaling.comparison import Experiment, KeptRun, differing_keys, read_kept
from mot_megatron.scaling.comparison_words import sentence, tally
from mot_megatron.scaling.curves import SPLITS, Split
from mot_megatron.scaling.match_plots import plot_losses, plot_matches, write_figures
from mot_megatron.scaling.step_matching import (
    DROPPED_BEGINNING,
    RESAMPLES,
    Match,
    default_window,
    match_arms,
    smooth,
)

REPORT_FILE = "report.md"
SLOPES_FILE = "slopes.json"
SPLIT_TITLES: dict[Split, str] = {
    "train": "Training loss",
    "held_out": "Held-out loss, routed as trained",
    "held_out_causal": "Held-out loss, routed causally",
}
_ENDING = 0.05
"""Share of the steps whose mean is the training loss at the end."""
_Arms = Mapping[str, Sequence[KeptRun]]


def write_report(experiment: Experiment, output: Path) -> list[Path]:
    """Match all arms against the baseline and write the report, its plots and slopes.json.

    Returns:
        The files.

    Raises:
        DataError: there is nothing to compare yet, or a file is damaged or cannot be written.
    """
    arms = read_kept(experiment, output)
    baseline = experiment.baseline
    curves = {name: [run.curves for run in runs] for name, runs in arms.items()}
    matches = [
        match
        for name, runs in curves.items()
        if name != baseline
        for match in match_arms(curves[baseline], runs, name=name)
    ]
    splits = _splits(matches)
    figures = {
        f"matched_steps_{split}": plot_matches(matches, split=split, baseline=baseline)
        for split in splits
    }
    figures |= {f"losses_{split}": plot_losses(curves, split=split) for split in splits}
    slopes = json.dumps([match.to_json() for match in matches], indent=1)
    paths = [output / REPORT_FILE, output / SLOPES_FILE]
    try:
        paths[1].write_text(slopes + "\n", encoding="utf-8")
        paths += write_figures(figures, output)
        text = report(experiment, arms, matches, list(figures))
        paths[0].write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}") from None
    return paths


def report(
    experiment: Experiment, arms: _Arms, matches: Sequence[Match], figures: Sequence[str]
) -> str:
    """The report as Markdown.

    Args:
        experiment: Says which arm is the baseline, and the paper's slopes.
        arms: Runs that have ended, the baseline's first.
        matches: Of all others against the baseline.
        figures: Names of the plots beside it.
    """
    baseline = experiment.baseline
    splits = _splits(matches)
    sections = [
        ["# The comparison", *_setting(arms)],
        ["## What came out", *_findings(arms, matches, baseline)],
        ["## The arms", *_arm_table(arms, baseline)],
        ["## Held-out loss at the end", *_final_losses(arms)],
        ["## Step matching", *_how_matched()],
        *(_slope_table(matches, split, arms) for split in splits),
        ["## Beside the paper", *_paper_table(experiment, matches)],
        ["## Memorising", *_memorising(arms)],
        ["## Plots", *(f"![{name}]({name}.png)" for name in figures)],
        ["## Commands", *_commands(arms)],
    ]
    return "\n\n".join("\n".join(_spaced(section)) for section in sections) + "\n"


def honest_matches(matches: Sequence[Match]) -> list[Match]:
    """In steps, on the held-out split, for each arm without a look at the future.

    An arm with expert choice is judged by its causal router. Where none of the arms has that, all
    are judged by the loss as trained.
    """
    causal = {match.arm for match in matches if match.split == "held_out_causal"}
    return [
        match
        for match in matches
        if match.axis == "steps"
        and match.split == ("held_out_causal" if match.arm in causal else "held_out")
    ]


def _setting(arms: _Arms) -> list[str]:
    runs = [run for of_arm in arms.values() for run in of_arm]
    records = [run.record for run in runs]
    first = records[0]
    machines = sorted({_machine(record.machine) for record in records})
    parallel = sorted({record.parallel for record in records})
    ended = sorted(record.ended for record in records)
    training, data = first.config.training, first.config.data
    tokens = runs[0].curves.tokens[-1]
    of_split = {
        split: f"{sum(counts.values()):,} tokens ("
        + ", ".join(f"{name} {count:,}" for name, count in counts.items())
        + ")"
        for split, counts in first.corpus["tokens"].items()
    }
    seen = tokens / sum(first.corpus["tokens"]["train"].values())
    hours = sum(record.summary["seconds"] for record in records) / 3600
    return [
        f"- Machine: {'; '.join(machines)}; at most {', '.join(map(str, parallel))} runs side by"
        " side, one process each",
        f"- {len(runs)} runs, {hours:.1f} hours of training steps in all; ended between"
        f" {ended[0]} and {ended[-1]}",
        f"- Corpus {first.corpus['name']} ({first.corpus['builder']}): "
        + "; ".join(f"{split} {counts}" for split, counts in of_split.items()),
        f"- {training.train_steps:,} steps of {training.global_batch_size} x {data.seq_length} ="
        f" {training.global_batch_size * data.seq_length:,} token slots; {tokens:,.0f} tokens up"
        f" to the last report, {seen:.2f} times the train split",
        f"- Precision {training.precision}; loss in bits per token",
    ]


def _machine(machine: Mapping[str, object]) -> str:
    device = machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores"
    return f"{device}, torch {machine['torch']}, Python {machine['python']}"


def _findings(arms: _Arms, matches: Sequence[Match], baseline: str) -> list[str]:
    honest = honest_matches(matches)
    lines = [
        f"On held-out data, without a look at the future, in steps, against {baseline}"
        f" ({_seeds(arms[baseline])}). Slopes of all arms and modalities: {tally(honest)}."
    ]
    for name in dict.fromkeys(match.arm for match in honest):
        lines += ["", f"**{name}** ({_seeds(arms[name])})", ""]
        lines += [f"- {sentence(match, baseline)}" for match in honest if match.arm == name]
    blind = [
        name
        for name, runs in arms.items()
        if runs[0].record.config.model.sees_the_future
        and not any(split == "held_out_causal" for split, _ in runs[0].curves.curves)
    ]
    if blind:
        lines += [
            "",
            f"No causal loss is known for {', '.join(blind)}: theirs above is of experts that chose"
            " among later tokens too, which flatters them.",
        ]
    return lines


def _arm_table(arms: _Arms, baseline: str) -> list[str]:
    of_baseline = arms[baseline][0].record.config
    dense_seconds = _seconds_per_step(arms[baseline])
    rows = []
    for name, runs in arms.items():
        config = runs[0].record.config
        seconds = _seconds_per_step(runs)
        flops = [f"{flops / 1e6:.3f}" for flops in active_flops_per_token(config.model)]
        rows.append(
            [
                name,
                ", ".join(config.model.tower_names),
                f"{count_parameters(config.model).total:,}",
                " / ".join(flops),
                f"{seconds:.3f} ({seconds / dense_seconds:.2f})",
                ", ".join(str(run.record.seed) for run in runs),
            ]
        )
    header = (
        "arm", "towers", "parameters", "active MFLOPs per token, by tower", "seconds per step",
        "seeds",
    )  # fmt: skip
    differences = [
        f"- {name}: {_differences(differing_keys(of_baseline, runs[0].record.config))}"
        for name, runs in arms.items()
        if name != baseline
    ]
    return [
        *_table(header, rows),
        "",
        "FLOPs are forward ones of the layers' matrices. Seconds per step are means over an arm's"
        f" runs, in brackets relative to {baseline}; runs beside each other and whatever else the"
        " machine did are in them.",
        "",
        f"Where the arms' configurations differ from {baseline}'s:",
        "",
        *differences,
    ]


def _differences(keys: Mapping[str, tuple[object, object]]) -> str:
    """What an arm sets; keys of tables that only the baseline has are left out."""
    said = [f"`{key} = {json.dumps(new)}`" for key, (_, new) in keys.items() if new is not None]
    return ", ".join(said) or "nowhere"


def _seconds_per_step(runs: Sequence[KeptRun]) -> float:
    summaries = [run.record.summary for run in runs]
    return statistics.fmean(summary["seconds"] / summary["steps"] for summary in summaries)


def _final_losses(arms: _Arms) -> list[str]:
    modalities = _modalities(arms)
    rows = []
    for name, runs in arms.items():
        for label, key in (
            ("as trained", "held_out_bits_per_token"),
            ("causal", "held_out_bits_per_token_causal"),
        ):
            cells = [
                _mean_and_spread(
                    [run.record.summary["modalities"][modality].get(key) for run in runs]
                )
                for modality in modalities
            ]
            if any(cell != "-" for cell in cells):
                rows.append([name, label, str(len(runs)), *cells])
    first = next(iter(arms.values()))[0].record.summary["modalities"]
    for label, key in (
        ("unigram", "unigram_entropy"),
        ("two tokens of context", "two_token_context_entropy"),
    ):
        values = [first[modality].get(key) for modality in modalities]
        cells = ["-" if value is None else f"{value:.3f}" for value in values]
        rows.append([f"counting: {label}", "", "", *cells])
    return [
        *_table(("arm", "routed", "seeds", *modalities), rows),
        "",
        "Bits per token of the whole validation split after the last step: mean and standard"
        " deviation over seeds.",
    ]


def _mean_and_spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = f"{statistics.fmean(known):.3f}"
    return f"{mean} ± {statistics.stdev(known):.3f}" if len(known) > 1 else mean


def _how_matched() -> list[str]:
    return [
        "For every step t of the baseline, tau is the first at which an arm has reached its loss"
        " there; the slope is sum(t tau) / sum(t²) and below 1 where the arm needs less. Curves"
        " are means over seeds, smoothed by a centred mean and made monotone by isotonic"
        " regression, and keep their best loss once they have it; the first"
        f" {DROPPED_BEGINNING:.0%} of the baseline's range is left out, and"
        " so are losses that the arm never reaches: the range reached says how far it comes."
        f" Intervals are of {RESAMPLES} bootstrap draws of the seeds; over two or three seeds they"
        " are rough, and rather too narrow.",
    ]


def _slope_table(matches: Sequence[Match], split: Split, arms: _Arms) -> list[str]:
    rows = []
    of_split = [match for match in matches if match.split == split]
    for name in dict.fromkeys(match.arm for match in of_split):
        for modality in _modalities(arms):
            along = {
                match.axis: match
                for match in of_split
                if (match.arm, match.modality) == (name, modality)
            }
            if not along:
                continue
            cells = [
                f"{_number(along[axis].slope)}{_interval(along[axis])}"
                for axis in ("steps", "flops", "seconds")
            ]
            steps = along["steps"]
            ending = _number(steps.end_point_ratio)
            rows.append([name, modality, *cells, ending, f"{steps.range_reached:.0%}"])
    header = (
        "arm", "modality", "slope in steps", "in FLOPs", "in seconds", "steps at the end",
        "range reached",
    )  # fmt: skip
    return [f"### {SPLIT_TITLES[split]}", *_table(header, rows)]


def _interval(match: Match) -> str:
    return "" if match.interval is None else " ({:.2f} to {:.2f})".format(*match.interval)


def _paper_table(experiment: Experiment, matches: Sequence[Match]) -> list[str]:
    ours = {
        (match.arm, match.modality): match
        for match in matches
        if (match.split, match.axis) == ("train", "steps")
    }
    rows = []
    for name, arm in experiment.arms.items():
        for modality, values in arm.paper.items():
            match = ours.get((name, modality))
            if match is None:
                continue
            theirs = ", ".join(f"{size} {value:.3f}" for size, value in values.items())
            rows.append([name, modality, f"{_number(match.slope)}{_interval(match)}", theirs])
    if not rows:
        return ["The paper prints nothing on these arms."]
    return [
        *_table(("arm", "modality", "here", "paper, by size of the dense model"), rows),
        "",
        "Slopes of the training loss in steps. The paper's batches are of one to three million"
        " tokens and its models a hundred times larger and more; (3): with speech.",
    ]


def _memorising(arms: _Arms) -> list[str]:
    modalities = _modalities(arms)
    rows = []
    for name, runs in arms.items():
        for modality in modalities:
            train = _mean_curve(runs, "train", modality)
            held_out = _mean_curve(runs, "held_out", modality)
            if train is None or held_out is None:
                continue
            steps, bits = train
            at_end = float(bits[steps > (1 - _ENDING) * steps[-1]].mean())
            evaluated, losses = held_out
            lowest = int(losses.argmin())
            rows.append(
                [
                    name,
                    modality,
                    f"{at_end:.3f}",
                    f"{losses[-1]:.3f}",
                    f"{losses[-1] - at_end:+.3f}",
                    f"{evaluated[lowest]:,}",
                    f"{losses[-1] - losses[lowest]:.3f}",
                ]
            )
    header = (
        "arm", "modality", "train, at the end", "held out", "gap", "held out lowest at step",
        "risen since",
    )  # fmt: skip
    return [
        *_table(header, rows),
        "",
        "Bits per token of the curves, means over seeds, routed as trained. A gap that grows from"
        " one arm to the next, and above all a held-out loss that rises again, are the marks of"
        " memorising; a gap that all arms share may be a difference between the splits.",
    ]


def _mean_curve(
    runs: Sequence[KeptRun], split: Split, modality: str
) -> tuple[np.ndarray, np.ndarray] | None:
    """Steps that all runs have, and the mean of their smoothed losses."""
    curves = [run.curves.curve(split, modality) for run in runs]
    known = [curve for curve in curves if curve is not None]
    if not known:
        return None
    common = known[0].steps
    for curve in known[1:]:
        common = np.intersect1d(common, curve.steps)
    bits = np.mean([curve.bits[np.isin(curve.steps, common)] for curve in known], axis=0)
    return common, smooth(bits, default_window(len(bits)))


def _commands(arms: _Arms) -> list[str]:
    records = [run.record for runs in arms.values() for run in runs]
    comparisons = dict.fromkeys(record.comparison for record in records)
    first = [runs[0].record.command for runs in arms.values()]
    return [
        "```",
        *comparisons,
        "```",
        "",
        "which started, of every arm the first seed shown:",
        "",
        "```",
        *first,
        "```",
    ]


def _splits(matches: Sequence[Match]) -> list[Split]:
    return [split for split in SPLITS if any(match.split == split for match in matches)]


def _modalities(arms: _Arms) -> list[str]:
    return list(next(iter(arms.values()))[0].record.config.model.modalities)


def _seeds(runs: Sequence[KeptRun]) -> str:
    return f"{len(runs)} seed{'s' if len(runs) > 1 else ''}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    line: Callable[[Sequence[str]], str] = lambda cells: f"| {' | '.join(cells)} |"  # noqa: E731
    return [line(header), f"|{'---|' * len(header)}", *map(line, rows)]


def _spaced(section: Sequence[str]) -> list[str]:
    """A section with an empty line after its heading."""
    heading, *rest = section
    return [heading, "", *rest]
