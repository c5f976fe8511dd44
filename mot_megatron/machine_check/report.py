"""The report of a machine's checks, as Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from mot_megatron.machine_check.outcome import Outcome

NOT_ON_A_GPU = "**Nothing here was run on a GPU.** The checks ran small, on the CPU."
_MARKS = {"PASS": "PASS", "FAIL": "**FAIL**", "SLOW": "**SLOW**", "SKIPPED": "skipped"}


def summary(outcomes: Mapping[str, Outcome]) -> str:
    """Return the number of outcomes of each kind in one line."""
    counts = Counter(outcome.status for outcome in outcomes.values())
    return ", ".join(f"{counts[status]} {status}" for status in _MARKS)


def page(machine: Mapping[str, Any], outcomes: Mapping[str, Outcome]) -> str:
    """Return the report: the machine, what to do, and a table per part."""
    lines = ["# Check of a machine", ""]
    if machine["device"] == "cpu":
        lines += [NOT_ON_A_GPU, ""]
    lines += [f"- {key}: {value}" for key, value in machine.items()]
    lines += ["", f"{summary(outcomes)}.", ""]
    todo = {n: o for n, o in outcomes.items() if o.status in ("FAIL", "SLOW")}
    if todo:
        lines += ["## What to do", ""]
        lines += [
            f"- **{outcome.status}** {name}: {outcome.seen}. {_sentence(outcome.advice)}".rstrip()
            for name, outcome in todo.items()
        ]
        lines.append("")
    for part in dict.fromkeys(name.partition("/")[0] for name in outcomes):
        lines += [f"## {part.capitalize()}", "", "| check | result | seen |", "|---|---|---|"]
        lines += [
            f"| {_cell(name.partition('/')[2])} | {_MARKS[outcome.status]} |"
            f" {_cell(outcome.seen)}{_note(outcome)} |"
            for name, outcome in outcomes.items()
            if name.partition("/")[0] == part
        ]
        lines.append("")
    return "\n".join(lines)


def _note(outcome: Outcome) -> str:
    """Return the advice of an outcome that is not listed under what to do."""
    shown = outcome.advice and outcome.status in ("PASS", "SKIPPED")
    return f" ({_cell(outcome.advice)})" if shown else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}." if text else ""
