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
        f"{'bits per token, held out':26}{'model':>8}{'unigram':>10}{'2-token context':>18}",
    ]
    for name, values in summary["modalities"].items():
        bits = honest_bits(values)
        unigram, context = (values[key] for key in BASELINES.values())
        if bits is None or unigram is None:
            lines.append(f"{name:26}{'-':>8}{'-':>10}{'-':>18}   no held-out tokens")
            continue
        beaten = [
            label for label, value in (("unigram", unigram), ("context", context)) if bits < value
        ]
        below = " and ".join(beaten) or "neither"
        lines.append(f"{name:26}{bits:8.3f}{unigram:10.3f}{context:18.3f}   below {below}")
    if summary.get("routed_with_later_tokens"):
        lines += ["", _routing_note(summary)]
    return "\n".join(lines)


def _ranks(number: int) -> str:
    return f"{number} rank" + "s" * (number != 1)


def honest_bits(values: dict[str, float | None]) -> float | None:
    """Return a modality's held-out loss, with causal routing if that was evaluated."""
    as_trained = values["held_out_bits_per_token"]
    return values.get("held_out_bits_per_token_causal", as_trained)


def _routing_note(summary: dict[str, Any]) -> str:
    """Return a note on routing, for a model whose routing in training depends on later tokens."""
    modalities = summary["modalities"]
    if not any("held_out_bits_per_token_causal" in values for values in modalities.values()):
        return (
            "routed with later tokens, as in training, which may flatter these losses: the model"
            " has no causal router"
        )
    with_later = ", ".join(
        f"{name} {bits:.3f}"
        for name, values in modalities.items()
        if (bits := values["held_out_bits_per_token"]) is not None
    )
    return f"routed causally; as in training, where routing sees later tokens: {with_later}"


def missed(summary: dict[str, Any], baseline: str) -> list[str]:
    """Return the modalities whose loss is not below the baseline, or that have no loss."""

    def beaten(values: dict[str, float | None]) -> bool:
        bits, entropy = honest_bits(values), values[BASELINES[baseline]]
        return bits is not None and entropy is not None and bits < entropy

    return [name for name, values in summary["modalities"].items() if not beaten(values)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``mot summary``; return the exit status."""
    return run_command(NAME, __doc__, add_arguments, run, arguments)
