"""Write the report of a comparison from the curves and records of its runs.

The report consists of report.md, plots and slopes.json.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
from mot_megatron.config import OptimizerConfig
from mot_megatron.config_model import ModelConfig, common_unit
from mot_megatron.data.corpus import HELD_OUT_SPLIT
from mot_megatron.errors import DataError
from mot_megatron.model.flops import active_flops_per_token, count_parameters

REPORT_FILE = "report.md"
_ENDING = 0.05
"""Fraction of the steps, the last ones, that the final training loss averages over."""
_MARK = "†"
"""Marks an arm whose loss comes from routing that saw later tokens."""
_Arms = Mapping[str, Sequence[RecordedRun]]


def write_report(experiment: Experiment, output: Path) -> list[Path]:
    """Match all arms against the baseline and write the report, its plots and slopes.json.

    Returns:
        The paths of the files written.

    Raises:
        DataError: Too few runs have ended, or a file is damaged or cannot be written.
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
    """Return the report as Markdown.

    Args:
        experiment: Names the baseline and has the paper's slopes.
        arms: Arm -> its runs that have ended; the baseline first.
        matches: Matches of all other arms against the baseline.
        figures: Names of the plots, which are in the report's folder.
    """
    baseline = experiment.baseline
    splits = splits_of(matches)
    sections = [
        ["# Comparison report", *_setting(arms)],
        ["## Results", *_findings(arms, matches, baseline)],
        ["## The arms", *_arm_table(arms, baseline)],
        ["## Final held-out loss", *_final_losses(arms)],
        ["## Step matching", *_how_matched()],
        *(_slope_table(matches, split, arms) for split in splits),
        *([_seed_by_seed(arms)] if len(arms[baseline]) > 1 else []),
        ["## Comparison with the paper", *_paper_table(experiment, arms, matches)],
        ["## Memorization", *_memorization(arms)],
        ["## Plots", *(f"![{name}]({name}.png)" for name in figures)],
        ["## Commands", *_commands(arms)],
    ]
    return "\n\n".join("\n".join(_spaced(section)) for section in sections) + "\n"


def honest_matches(matches: Sequence[Match]) -> list[Match]:
    """Return the matches in steps of each arm's held-out loss, routed causally if possible.

    If the routing of an arm or of the baseline sees later tokens, the arm is judged by its causally
    routed loss; if that was not logged, by the loss as routed in training.
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
        f"- {len(runs)} runs with {hours:.1f} hours of training steps in total, finished between"
        f" {ended[0]} and {ended[-1]}",
        f"- Corpus {first.corpus['name']} ({first.corpus['builder']}): "
        + "; ".join(f"{split} {counts}" for split, counts in of_split.items()),
        f"- {training.train_steps:,} steps of {training.global_batch_size} x {data.seq_length} ="
        f" {training.global_batch_size * data.seq_length:,} token slots; {tokens:,.0f} tokens"
        f" processed by the last report, {seen:.2f} times the train split",
        f"- {_model(first.config.model)}",
        f"- {_optimizer(first.config.optimizer)}; precision {training.precision}; losses in"
        f" {_unit_words(first.config.model)}",
        f"- {_held_out(first)}",
        *(f"- Caution: {line}" for line in warnings([run.curves for run in runs])),
    ]


def _model(model: ModelConfig) -> str:
    """Describe the baseline's shape, and how much of it no arm unties."""
    parameters = count_parameters(model).total
    vocabulary = model.hidden_size * model.num_vocabulary_rows
    matrices = 2 if model.untie_embeddings_and_output_weights else 1
    layers, head = max(active_flops_per_token(model)), 2 * vocabulary
    return (
        f"Hidden size {model.hidden_size}, {model.num_layers} layers,"
        f" {model.num_attention_heads} heads, feed-forward width {model.feed_forward_size},"
        f" {model.norm_placement}-norm. In every arm, all modalities share the embedding and the"
        f" output head. These hold {matrices * vocabulary / parameters:.0%} of the baseline's"
        f" {parameters:,} parameters, and the head takes {head / (head + layers):.0%} of its matrix"
        " FLOPs; the arms differ only in the rest"
    )


def _optimizer(optimizer: OptimizerConfig) -> str:
    return (
        f"AdamW, learning rate {optimizer.lr:g} to {optimizer.min_lr:g}"
        f" ({optimizer.lr_decay_style}), weight decay {optimizer.weight_decay:g}, the same for all"
        " arms unless stated below"
    )


def _held_out(record: RunRecord) -> str:
    evaluation, length = record.config.evaluation, record.config.data.seq_length
    sequences, final = evaluation.max_sequences, evaluation.final_max_sequences
    whole = sum(record.corpus["tokens"][HELD_OUT_SPLIT].values())
    if sequences == final and (sequences is None or sequences * length >= whole):
        return "Held-out losses use the whole validation split"
    of_all = "the whole split" if final is None else f"{final} sequences"
    if sequences is None:
        return f"Held-out curves use the whole validation split, final held-out losses {of_all}"
    return (
        f"Held-out curves use {sequences} sequences, {sequences * length / whole:.0%} of the"
        " validation split and the same for all runs; the intervals do not include the uncertainty"
        f" from this choice. Final held-out losses use {of_all}"
    )


def _machine(machine: Mapping[str, object]) -> str:
    device = machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores"
    return f"{device}, torch {machine['torch']}, Python {machine['python']}"


def _findings(arms: _Arms, matches: Sequence[Match], baseline: str) -> list[str]:
    honest = honest_matches(matches)
    blind = [name for name, runs in arms.items() if runs[0].curves.without_honest_loss]
    but_for = f", except in {', '.join(blind)}" if blind else ""
    lines = [
        f"What fraction of {baseline}'s steps does an arm need to reach the same held-out loss? The"
        " slope is the answer over the range reached; below 1, the arm needs fewer steps. The"
        f" baseline, {baseline}, has {_seeds(arms[baseline])}; routing does not see later"
        f" tokens{but_for}.",
        "",
        f"Conclusions over all arms and modalities: {tally(honest)}.",
    ]
    for name in dict.fromkeys(match.arm for match in honest):
        lines += ["", f"**{name}** ({_seeds(arms[name])})", ""]
        lines += [f"- {sentence(match, baseline)}" for match in honest if match.arm == name]
    if blind:
        lines += [
            "",
            f"No causally routed loss is known for {', '.join(blind)}: the loss above comes from"
            " routing that saw later tokens, which may flatter the model.",
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
        "FLOPs are those of the layers' matrices in the forward pass. Seconds per step are means"
        f" over an arm's runs, with the ratio to {baseline} in brackets; they include slowdowns"
        " from runs side by side and from other work on the machine. A causal router is trained"
        " alongside its model: the seconds include it, the FLOPs do not. With causal routing, every"
        " expert decides independently, so a token may pass through more or fewer experts than in"
        " training.",
        "",
        f"Differences between the arms' configurations and {baseline}'s:",
        "",
        *differences,
    ]


def _differences(keys: Mapping[str, tuple[object, object]]) -> str:
    """List the keys an arm sets; keys of tables that only the baseline has are left out."""
    said = [f"`{key} = {json.dumps(new)}`" for key, (_, new) in keys.items() if new is not None]
    return ", ".join(said) or "none"


def _seconds_per_step(runs: Sequence[RecordedRun]) -> float:
    summaries = [run.record.summary for run in runs]
    return statistics.fmean(summary["seconds"] / summary["steps"] for summary in summaries)


def _final_losses(arms: _Arms) -> list[str]:
    modalities = _modalities(arms)
    rows = []
    for name, runs in arms.items():
        for label, key in (
            ("as in training", "held_out_{}"),
            ("causally", "held_out_{}_causal"),
        ):
            cells = [
                _mean_and_spread([_of_unit(run.record.summary, modality, key) for run in runs])
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
        rows.append([f"n-gram table: {label}", "", "", *cells])
    return [
        *_table(("arm", "routed", "seeds", *modalities), rows),
        "",
        f"{_units(arms)} on the whole validation split after the last step: mean ± standard"
        " deviation over seeds. The n-gram tables predict a token from its frequency or from two"
        " earlier tokens; they are counted on the train split.",
    ]


def _of_unit(summary: Mapping[str, Any], modality: str, key: str) -> float | None:
    """Return a held-out loss, whose key says "loss" unless it is in bits per token."""
    values = summary["modalities"][modality]
    return values.get(key.format("bits_per_token"), values.get(key.format("loss")))


def _units(arms: _Arms) -> str:
    """Return the unit of the losses as the beginning of a sentence."""
    words = _unit_words(next(iter(arms.values()))[0].record.config.model)
    return words[0].upper() + words[1:]


def _unit_words(model: ModelConfig) -> str:
    common = common_unit(model.loss_units.values())
    if common:
        return common.name
    return "units of " + ", ".join(f"{u.name} ({name})" for name, u in model.loss_units.items())


def _mean_and_spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = f"{statistics.fmean(known):.3f}"
    return f"{mean} ± {statistics.stdev(known):.3f}" if len(known) > 1 else mean


def _how_matched() -> list[str]:
    return [
        "- For every step t of the baseline, tau is the first step at which the arm reaches the"
        " baseline's loss at t. The slope is sum(t tau) / sum(t²); below 1, the arm needs fewer"
        " steps.",
        "- Curves are means over seeds, smoothed by a centered mean and made monotone by isotonic"
        " regression. A curve that overfits stays at its lowest loss. If the baseline overfits,"
        " only its steps up to the minimum are matched; the report says so.",
        f"- Points in the first {DROPPED_BEGINNING:.0%} of the matched steps are dropped, and so"
        " are those whose loss the arm never reaches. The range reached is the last step of the"
        " baseline whose loss the arm reaches, as a fraction of the steps matched.",
        f"- Intervals are {CONFIDENCE_PERCENT}% bootstrap intervals from {RESAMPLES} draws of the"
        " seeds. If both arms have the same seeds, these are drawn together, because runs of one"
        " seed read the same batches. With few seeds, intervals are too narrow: with three pairs of"
        " runs, they span from the lowest to the highest slope and contain the true value in 75% of"
        " cases; with five pairs, in 84%.",
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
        "arm", "modality", "slope in steps", "in FLOPs", "in seconds",
        "tau / t at the last loss reached", "range reached", "points used", "dropped",
        "of these never reached",
    )  # fmt: skip
    note = _mark_note(arms) if split != "held_out_causal" else []
    return [f"### {SPLIT_TITLES[split].capitalize()}", *_table(header, rows), *note]


def _seed_by_seed(arms: _Arms) -> list[str]:
    """Match single runs with each other, to show how far a slope from one seed can be trusted."""
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
        "Slopes of the held-out loss in steps; of the causally routed loss if it is known. Slopes"
        f" between two runs of {baseline} differ from 1 only by chance.",
    ]


def _marked(name: str, arms: _Arms) -> str:
    """Return an arm's name for tables of losses routed as in training."""
    sees_the_future = arms[name][0].record.config.model.sees_the_future
    return f"{name} {_MARK}" if sees_the_future else name


def _mark_note(arms: _Arms) -> list[str]:
    marked = [name for name in arms if _marked(name, arms) != name]
    baseline = next(iter(arms))
    if not marked:
        return []
    line = f"{_MARK} Routing saw later tokens, which may flatter this loss."
    return ["", f"{line} So did {baseline}'s." if baseline in marked else line]


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
        return said or [f"{EXPERIMENT_FILE} has no results of the paper for these arms."]
    baseline = experiment.baseline
    summary = arms[baseline][0].record.summary
    parameters = count_parameters(arms[baseline][0].record.config.model).total
    return [
        *_table(("arm", "modality", "here", "range reached here", "paper, by model size"), rows),
        *_mark_note(arms),
        "",
        "Slopes of the training loss in steps."
        f" Here {baseline} has {parameters:,} parameters and is"
        f" trained on {summary['tokens'] / summary['steps']:,.0f} tokens per step; the paper's"
        f" model sizes are named as in {EXPERIMENT_FILE}.",
        *(["", "Other results of the paper:", "", *said] if said else []),
    ]


def _memorization(arms: _Arms) -> list[str]:
    modalities = _modalities(arms)
    rows = []
    for name, runs in arms.items():
        for modality in modalities:
            train = _mean_curve(runs, "train", modality)
            held_out = _mean_curve(runs, "held_out", modality)
            if train is None or held_out is None:
                continue
            at_end = float(train.losses[train.steps > (1 - _ENDING) * train.steps[-1]].mean())
            losses = held_out.losses
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
        "arm", "modality", "final training loss", "final held-out loss", "gap",
        "held-out loss lowest at step", "rise since then",
    )  # fmt: skip
    return [
        *_table(header, rows),
        *_mark_note(arms),
        "",
        f"{_units(arms)} of the curves, as means over seeds, routed as in training; the final"
        f" training loss is a mean over the last {_ENDING:.0%} of the steps. The clearest sign of"
        " memorization is a held-out loss that rises again; a gap that is larger in one arm than in"
        " another is a weaker sign. A gap that all arms share may be a difference between the"
        " splits.",
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
        "This started the following runs (only the first seed of each arm is shown):",
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
    """Add an empty line after the heading of a section."""
    heading, *rest = section
    return [heading, "", *rest]
