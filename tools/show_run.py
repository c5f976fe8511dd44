"""Print what runs reached: held-out loss of every modality beside the corpus's entropies.

Example: show_run.py runs/quickstart --require unigram
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from mot_megatron.errors import DataError, UserError

SUMMARY_FILE = "summary.json"
BASELINES = {"unigram": "unigram_entropy", "two-token": "two_token_context_entropy"}


def read_summary(run: Path) -> dict[str, Any]:
    """The summary in a run's folder."""
    path = run / SUMMARY_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; has the run ended?") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not a summary: {error}") from None


def table(summary: dict[str, Any]) -> str:
    """The summary as a person reads it."""
    rate = summary["tokens_per_second"] or 0.0
    lines = [
        f"{summary['name']}: {summary['steps']} steps, {summary['tokens']:,} tokens in"
        f" {summary['seconds']:.0f} s ({rate:,.0f} tokens/s), {summary['parameters'] / 1e6:.2f} M"
        " parameters",
        f"on {summary['world_size']} ranks of {summary['device']}",
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
        lines += ["", _how_routed(summary)]
    return "\n".join(lines)


def honest_bits(values: dict[str, float | None]) -> float | None:
    """A modality's held-out loss, routed causally where the model was evaluated so."""
    as_trained = values["held_out_bits_per_token"]
    return values.get("held_out_bits_per_token_causal", as_trained)


def _how_routed(summary: dict[str, Any]) -> str:
    """A line below the table of a model that trains with a look at later tokens."""
    modalities = summary["modalities"]
    if not any("held_out_bits_per_token_causal" in values for values in modalities.values()):
        return (
            "routed with later tokens, as in training: no causal router makes these losses honest"
        )
    with_later = ", ".join(
        f"{name} {bits:.3f}"
        for name, values in modalities.items()
        if (bits := values["held_out_bits_per_token"]) is not None
    )
    return f"routed causally; as in training, where experts choose among later tokens: {with_later}"


def missed(summary: dict[str, Any], baseline: str) -> list[str]:
    """Modalities whose loss is not below the baseline, or that have none."""

    def beaten(values: dict[str, float | None]) -> bool:
        bits, entropy = honest_bits(values), values[BASELINES[baseline]]
        return bits is not None and entropy is not None and bits < entropy

    return [name for name, values in summary["modalities"].items() if not beaten(values)]


def main(arguments: list[str] | None = None) -> int:
    """Print the tables; 1 if a required baseline is missed, 2 after bad input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs that have ended")
    parser.add_argument(
        "--require", choices=list(BASELINES), help="fail unless every modality is below this"
    )
    options = parser.parse_args(arguments)
    status = 0
    try:
        for run in options.runs:
            summary = read_summary(run)
            print(table(summary))
            above = missed(summary, options.require) if options.require else []
            if above:
                print(f"not below {options.require}: {', '.join(above)}", file=sys.stderr)
                status = 1
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main())
