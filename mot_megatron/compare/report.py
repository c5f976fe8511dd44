"""The report of a comparison, made of what is kept of its runs: Markdown, plots and slopes.json."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from mot_megatron.compare.curves import AXES, SPLIT_TITLES, Curve, Split, warnings
from mot_megatron.compare.experiment import (
    EXPERIMENT_FILE,
    Experiment,
    RecordedRun,
    RunRecord,
    differing_settings,
    read_records,
)
from mot_megatron.compare.match_files import draw_all, write_matches
from mot_megatron.compare.step_matching import (
    CONFIDENCE_PERCENT,
    DROPPED_BEGINNING,
    RESAMPLES,
    Match,
    match_arms,
    smoothed_mean,
    splits_of,
)
from mot_megatron.compare.words import number, sentence, tally
from mot_megatron.config import ModelConfig, OptimizerConfig
from mot_megatron.errors import DataError
from mot_megatron.model.flops import active_flops_per_token, count_parameters
from mot_megatron.train.session import HELD_OUT_SPLIT

REPORT_FILE = "report.md"
_ENDING = 0.05
"""Share of the steps whose mean is the training loss at the end."""
_MARK = "†"
"""Stands beside the name of an arm whose loss saw later tokens."""
_Arms = Mapping[str, Sequence[RecordedRun]]


def write_report(experiment: Experiment, output: Path) -> list[Path]:
    """Match all arms against the baseline and write the report, its plots and slopes.json.

    Returns:
        The files.

    Raises:
        DataError: there is nothing to compare yet, or a file is damaged or cannot be written.
    """
    arms = read_records(experiment, output)
    baseline = experiment.baseline
    curves = {name: [run.curves for run in runs] for name, runs in arms.items()}
    matches = [
        match
        for name, runs in curves.items()
        if name != baseline
        for match in match_arms(curves[baseline], runs, name=name)
    ]
    figures = draw_all(curves, matches)
    path = output / REPORT_FILE
    paths = [path, *write_matches(matches, figures, output)]
    try:
        path.write_text(report(experiment, arms, matches, list(figures)), encoding="utf-8")
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
    splits = splits_of(matches)
    sections = [
        ["# The comparison", *_setting(arms)],
        ["## What came out", *_findings(arms, matches, baseline)],
        ["## The arms", *_arm_table(arms, baseline)],
        ["## Held-out loss at the end", *_final_losses(arms)],
        ["## Step matching", *_how_matched()],
        *(_slope_table(matches, split, arms) for split in splits),
        *([_seed_by_seed(arms)] if len(arms[baseline]) > 1 else []),
        ["## Beside the paper", *_paper_table(experiment, arms, matches)],
        ["## Memorising", *_memorising(arms)],
        ["## Plots", *(f"![{name}]({name}.png)" for name in figures)],
        ["## Commands", *_commands(arms)],
    ]
    return "\n\n".join("\n".join(_spaced(section)) for section in sections) + "\n"


def honest_matches(matches: Sequence[Match]) -> list[Match]:
    """In steps, on the held-out split, for each arm without a look at the future.

    An arm that sees the future, or whose baseline does, is judged by the loss without later tokens;
    where that is not known, by the loss as trained.
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
        f"- {_model(first.config.model)}",
        f"- {_optimizer(first.config.optimizer)}; precision {training.precision}; loss in bits per"
        " token",
        f"- {_held_out(first)}",
        *(f"- Bear in mind: {line}" for line in warnings([run.curves for run in runs])),
    ]


def _model(model: ModelConfig) -> str:
    """The baseline's shape, and how much of it is the same in all arms whatever is untied."""
    parameters = count_parameters(model).total
    vocabulary = model.hidden_size * model.num_vocabulary_rows
    matrices = 2 if model.untie_embeddings_and_output_weights else 1
    layers, head = max(active_flops_per_token(model)), 2 * vocabulary
    return (
        f"Hidden size {model.hidden_size}, {model.num_layers} layers,"
        f" {model.num_attention_heads} heads, feed-forward width {model.feed_forward_size},"
        f" {model.norm_placement}-norm. Embedding and head, which all modalities share in every"
        f" arm, are {matrices * vocabulary / parameters:.0%} of the baseline's {parameters:,}"
        f" parameters; of its matrices' FLOPs {head / (head + layers):.0%} are the head's: arms"
        " differ in the rest"
    )


def _optimizer(optimizer: OptimizerConfig) -> str:
    return (
        f"AdamW, learning rate {optimizer.lr:g} to {optimizer.min_lr:g}"
        f" ({optimizer.lr_decay_style}), weight decay {optimizer.weight_decay:g}, the same for all"
        " arms unless it is said below"
    )


def _held_out(record: RunRecord) -> str:
    sequences, length = record.config.evaluation.max_sequences, record.config.data.seq_length
    whole = sum(record.corpus["tokens"][HELD_OUT_SPLIT].values())
    if sequences is None or sequences * length >= whole:
        return "Held-out losses are of the whole validation split"
    return (
        f"Held-out curves are of {sequences} sequences, {sequences * length / whole:.0%} of the"
        " validation split and the same for all runs; how much the choice of these weighs, no"
        " interval shows. The losses at the end are of the whole split"
    )


def _machine(machine: Mapping[str, object]) -> str:
    device = machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores"
    return f"{device}, torch {machine['torch']}, Python {machine['python']}"


def _findings(arms: _Arms, matches: Sequence[Match], baseline: str) -> list[str]:
    honest = honest_matches(matches)
    blind = [name for name, runs in arms.items() if runs[0].curves.without_honest_loss]
    but_for = f" but for {', '.join(blind)}" if blind else ""
    lines = [
        f"On held-out data, without a look at later tokens{but_for}, in steps, against {baseline}"
        f" ({_seeds(arms[baseline])}). Slopes of all arms and modalities: {tally(honest)}."
    ]
    for name in dict.fromkeys(match.arm for match in honest):
        lines += ["", f"**{name}** ({_seeds(arms[name])})", ""]
        lines += [f"- {sentence(match, baseline)}" for match in honest if match.arm == name]
    if blind:
        lines += [
            "",
            f"Of {', '.join(blind)} no loss without later tokens is known: the one above is of a"
            " routing that looked at them, which may flatter.",
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
        f"- {name}: {_differences(differing_settings(of_baseline, runs[0].record.config))}"
        for name, runs in arms.items()
        if name != baseline
    ]
    return [
        *_table(header, rows),
        "",
        "FLOPs are forward ones of the layers' matrices. Seconds per step are means over an arm's"
        f" runs, in brackets relative to {baseline}; runs beside each other and whatever else the"
        " machine did are in them. A causal router is trained beside its model: its time is among"
        " the seconds, its FLOPs are not among the model's. Routed causally, every expert decides"
        " for itself, and a token may run through more or fewer than as trained.",
        "",
        f"Where the arms' configurations differ from {baseline}'s:",
        "",
        *differences,
    ]


def _differences(keys: Mapping[str, tuple[object, object]]) -> str:
    """What an arm sets; keys of tables that only the baseline has are left out."""
    said = [f"`{key} = {json.dumps(new)}`" for key, (_, new) in keys.items() if new is not None]
    return ", ".join(said) or "nowhere"


def _seconds_per_step(runs: Sequence[RecordedRun]) -> float:
    summaries = [run.record.summary for run in runs]
    return statistics.fmean(summary["seconds"] / summary["steps"] for summary in summaries)


def _final_losses(arms: _Arms) -> list[str]:
    modalities = _modalities(arms)
    rows = []
    for name, runs in arms.items():
        for label, key in (
            ("as trained", "held_out_bits_per_token"),
            ("without later tokens", "held_out_bits_per_token_causal"),
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
        " are means over seeds, smoothed by a centered mean and made monotone by isotonic"
        " regression; one that turns and rises keeps its best loss, and of such a baseline only"
        f" the steps up to there are matched. The first {DROPPED_BEGINNING:.0%} are left out, and"
        " so are losses that the arm never reaches: the range reached, a part of the matched"
        f" steps, says how far it comes. Intervals are of {RESAMPLES} bootstrap draws of the seeds,"
        f" from which {CONFIDENCE_PERCENT}% of the slopes are taken; where both arms have the same"
        " seeds they are drawn together, as runs of one seed read the same batches. Of few seeds"
        " intervals are too narrow: with three pairs of runs they reach from the lowest to the"
        " highest, in which the true value lies in 75% of cases, with five pairs in 84%.",
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
            steps = along["steps"]
            rows.append(
                [
                    _marked(name, arms) if split != "held_out_causal" else name,
                    modality,
                    *(f"{number(along[axis].slope)}{_interval(along[axis])}" for axis in AXES),
                    number(steps.end_point_ratio),
                    f"{steps.range_reached:.0%}",
                    str(steps.points),
                    str(steps.dropped),
                    str(steps.unreached),
                ]
            )
    header = (
        "arm", "modality", "slope in steps", "in FLOPs", "in seconds", "tau / t where last reached",
        "range reached", "points", "dropped", "of them unreached",
    )  # fmt: skip
    note = _what_the_mark_says(arms) if split != "held_out_causal" else []
    return [f"### {SPLIT_TITLES[split].capitalize()}", *_table(header, rows), *note]


def _seed_by_seed(arms: _Arms) -> list[str]:
    """Single runs against each other: how far a slope from one seed can be trusted."""
    baseline, modalities = next(iter(arms)), _modalities(arms)
    first, *others = arms[baseline]
    partners = {run.record.seed: run for run in arms[baseline]}
    pairs = [(first, run) for run in others] + [
        (partners[run.record.seed], run)
        for name, runs in arms.items()
        for run in runs
        if name != baseline and run.record.seed in partners
    ]
    rows = []
    for ours, theirs in pairs:
        matches = honest_matches(
            match_arms([ours.curves], [theirs.curves], name=theirs.record.arm, axes=("steps",))
        )
        slopes = {match.modality: number(match.slope) for match in matches}
        names = [f"{run.record.arm}, seed {run.record.seed}" for run in (theirs, ours)]
        rows.append([*names, *(slopes.get(modality, "-") for modality in modalities)])
    return [
        "### Seed by seed",
        *_table(("run", "against", *modalities), rows),
        "",
        "Slopes of the held-out loss in steps, without later tokens where that is known. How far"
        f" those between runs of {baseline} alone are from 1, chance does.",
    ]


def _marked(name: str, arms: _Arms) -> str:
    """An arm's name, for tables of losses as trained."""
    sees_the_future = arms[name][0].record.config.model.sees_the_future
    return f"{name} {_MARK}" if sees_the_future else name


def _what_the_mark_says(arms: _Arms) -> list[str]:
    marked = [name for name in arms if _marked(name, arms) != name]
    baseline = next(iter(arms))
    if not marked:
        return []
    line = f"{_MARK} The routing looked at later tokens, which may flatter this loss."
    return ["", f"{line} So did that of {baseline}." if baseline in marked else line]


def _interval(match: Match) -> str:
    return "" if match.interval is None else " ({:.2f} to {:.2f})".format(*match.interval)


def _paper_table(experiment: Experiment, arms: _Arms, matches: Sequence[Match]) -> list[str]:
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
            rows.append(
                [
                    _marked(name, arms),
                    modality,
                    f"{number(match.slope)}{_interval(match)}",
                    f"{match.range_reached:.0%}",
                    ", ".join(f"{size} {value:.3f}" for size, value in values.items()),
                ]
            )
    said = [
        f"- {name}: {experiment.arms[name].paper_says}"
        for name in arms
        if experiment.arms[name].paper_says
    ]
    if not rows:
        return said or [f"{EXPERIMENT_FILE} has nothing of the paper on these arms."]
    baseline = experiment.baseline
    summary = arms[baseline][0].record.summary
    parameters = count_parameters(arms[baseline][0].record.config.model).total
    return [
        *_table(("arm", "modality", "here", "range reached here", "paper, by model size"), rows),
        *_what_the_mark_says(arms),
        "",
        "Slopes of the training loss in steps."
        f" Here {baseline} has {parameters:,} parameters and is"
        f" trained on {summary['tokens'] / summary['steps']:,.0f} tokens per step; the paper's"
        f" sizes are called as in {EXPERIMENT_FILE}.",
        *(["", "The paper says besides, of", "", *said] if said else []),
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
            at_end = float(train.bits[train.steps > (1 - _ENDING) * train.steps[-1]].mean())
            losses = held_out.bits
            lowest = int(losses.argmin())
            rows.append(
                [
                    _marked(name, arms),
                    modality,
                    f"{at_end:.3f}",
                    f"{losses[-1]:.3f}",
                    f"{losses[-1] - at_end:+.3f}",
                    f"{held_out.steps[lowest]:,}",
                    f"{losses[-1] - losses[lowest]:.3f}",
                ]
            )
    header = (
        "arm", "modality", "train, at the end", "held out", "gap", "held out lowest at step",
        "risen since",
    )  # fmt: skip
    return [
        *_table(header, rows),
        *_what_the_mark_says(arms),
        "",
        "Bits per token of the curves, means over seeds, routed as trained. A gap that grows from"
        " one arm to the next, and above all a held-out loss that rises again, are the marks of"
        " memorising; a gap that all arms share may be a difference between the splits.",
    ]


def _mean_curve(runs: Sequence[RecordedRun], split: Split, modality: str) -> Curve | None:
    known = [curve for run in runs if (curve := run.curves.curve(split, modality))]
    return smoothed_mean(known) if known else None


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


def _modalities(arms: _Arms) -> list[str]:
    return list(next(iter(arms.values()))[0].record.config.model.modalities)


def _seeds(runs: Sequence[RecordedRun]) -> str:
    return f"{len(runs)} seed{'s' if len(runs) > 1 else ''}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    return [line(header), f"|{'---|' * len(header)}", *map(line, rows)]


def _spaced(section: Sequence[str]) -> list[str]:
    """A section with an empty line after its heading."""
    heading, *rest = section
    return [heading, "", *rest]
