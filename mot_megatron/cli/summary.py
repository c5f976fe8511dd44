"""Show the results of finished runs: the held-out loss of every modality, next to entropies.

The entropies are those of the corpus, from token counts without context (unigram) and with two
tokens of context.

Example: mot summary --checkpoint runs/quickstart --require unigram
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mot_megatron.cli.arguments import add_checkpoints, add_json
from mot_megatron.cli.command import print_json, run_command
from mot_megatron.errors import DataError

NAME = "summary"
SUMMARY_FILE = "summary.json"
BASELINES = {"unigram": "unigram_entropy", "two-token": "two_token_context_entropy"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command line."""
    add_checkpoints(parser, "folder of a finished run")
    parser.add_argument(
        "--require",
        choices=list(BASELINES),
        help="fail unless every modality's loss is below this entropy",
    )
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Print the summaries; return 1 if a loss is not below the required entropy."""
    status = 0
    summaries = []
    for path in options.checkpoints:
        summary = read_summary(path)
        summaries.append(summary)
        if not options.json:
            print(table(summary), flush=True)
            if summary.get("stale"):
                print("stale: the run was trained further since then", flush=True)
        above = missed(summary, options.require) if options.require else []
        if above:
            print(f"not below {options.require}: {', '.join(above)}", file=sys.stderr)
            status = 1
    if options.json:
        print_json({"runs": summaries})
    return status


def read_summary(run_directory: Path) -> dict[str, Any]:
    """Read the summary in a run's folder.

    Raises:
        DataError: There is no summary, or it cannot be read.
    """
    path = run_directory / SUMMARY_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; has the run finished?") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not a summary: {error}") from None


def table(summary: dict[str, Any]) -> str:
    """Return the summary as text."""
    rate = summary["tokens_per_second"] or 0.0
    lines = [
        f"{summary['name']}: {summary['steps']} steps, {summary['tokens']:,} tokens in"
        f" {summary['seconds']:.0f} s ({rate:,.0f} tokens/s), {summary['parameters'] / 1e6:.2f} M"
        " parameters",
        f"on {_ranks(summary['world_size'])} of {summary['device']}",
        "",
        *_loss_lines(summary["modalities"]),
    ]
    if summary.get("routed_with_later_tokens"):
        lines += ["", _routing_note(summary)]
    return "\n".join(lines)


def _loss_lines(modalities: dict[str, dict[str, Any]]) -> list[str]:
    """Return a table of the losses in bits per token, and below it those in other units."""
    lines = [f"{'bits per token, held out':26}{'model':>8}{'unigram':>10}{'2-token context':>18}"]
    others = [values for values in modalities.values() if "unit" in values]
    for name, values in modalities.items():
        if "unit" in values:
            continue
        loss = honest_loss(values)
        unigram, context = (values[key] for key in BASELINES.values())
        if loss is None or unigram is None:
            lines.append(f"{name:26}{'-':>8}{'-':>10}{'-':>18}   no held-out tokens")
            continue
        beaten = [
            label for label, value in (("unigram", unigram), ("context", context)) if loss < value
        ]
        below = " and ".join(beaten) or "neither"
        lines.append(f"{name:26}{loss:8.3f}{unigram:10.3f}{context:18.3f}   below {below}")
    for unit in dict.fromkeys(values["unit"] for values in others):
        lines += ["", f"{unit}, held out"]
        for name, values in modalities.items():
            if values.get("unit") == unit:
                loss = honest_loss(values)
                lines.append(f"{name:26}{'-' if loss is None else f'{loss:.3f}':>8}")
    return lines


def _ranks(number: int) -> str:
    return f"{number} rank" + "s" * (number != 1)


def honest_loss(values: dict[str, Any]) -> float | None:
    """Return a modality's held-out loss, with causal routing if that was evaluated."""
    return values.get(f"{_key(values)}_causal", values[_key(values)])


def _key(values: dict[str, Any]) -> str:
    """Return the key of a modality's held-out loss; it names the unit if no other key does."""
    return "held_out_loss" if "unit" in values else "held_out_bits_per_token"


def _routing_note(summary: dict[str, Any]) -> str:
    """Return a note on routing, for a model whose routing in training depends on later tokens."""
    modalities = summary["modalities"]
    if not any(f"{_key(values)}_causal" in values for values in modalities.values()):
        return (
            "routed with later tokens, as in training, which may flatter these losses: the model"
            " has no causal router"
        )
    with_later = ", ".join(
        f"{name} {loss:.3f}"
        for name, values in modalities.items()
        if (loss := values[_key(values)]) is not None
    )
    return f"routed causally; as in training, where routing sees later tokens: {with_later}"


def missed(summary: dict[str, Any], baseline: str) -> list[str]:
    """Return the modalities whose loss is not below the baseline, or that have no loss.

    Entropies are baselines of tokens only; losses in other units are not compared with them.
    """

    def beaten(values: dict[str, Any]) -> bool:
        loss, entropy = honest_loss(values), values[BASELINES[baseline]]
        return loss is not None and entropy is not None and loss < entropy

    of_tokens = {k: v for k, v in summary["modalities"].items() if "unit" not in v}
    return [name for name, values in of_tokens.items() if not beaten(values)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``mot summary``; return the exit status."""
    return run_command(NAME, __doc__, add_arguments, run, arguments)
