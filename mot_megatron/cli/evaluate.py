"""Measure a trained model's held-out loss by kind of label.

The kinds are special tokens, the most common code of a modality (for pictures, the background) and
all other labels. Losses are in bits per token. If the model's routing depends on later tokens and a
causal router was trained, the losses with causal routing follow. For towers with experts, the
number of experts per token is also shown.

Example: mot evaluate --checkpoint runs/quickstart
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mot_megatron.cli.arguments import add_checkpoints, add_json, add_moved_corpus
from mot_megatron.cli.command import choose_device, print_json, run_command, say
from mot_megatron.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from mot_megatron.train.label_kinds import KindLoss
    from mot_megatron.train.trained import TrainedModel

NAME = "evaluate"
AS_TRAINED, CAUSAL = "as_trained", "causal"
TITLES = {
    AS_TRAINED: "routed as in training, where a token's experts depend on later tokens",
    CAUSAL: "routed causally, as in generation",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command line."""
    add_checkpoints(parser)
    parser.add_argument(
        "--sequences",
        type=int,
        metavar="N",
        help="evaluate N packed sequences of the validation split (default: all)",
    )
    add_moved_corpus(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Evaluate every checkpoint and print its losses."""
    if options.sequences is not None and options.sequences < 1:
        raise ConfigError(f"--sequences {options.sequences}: must be at least 1")
    results = []
    for number, path in enumerate(options.checkpoints):
        say(NAME, f"loading {path}")
        results.append(evaluate(path, choose_device(), options))
        if not options.json:
            print(("\n" if number else "") + text(results[-1]), flush=True)
    if options.json:
        print_json({"checkpoints": results})
    return 0


def evaluate(path: Path, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """Return the checkpoint's path and step, and its losses with each kind of routing.

    Raises:
        UserError: See ``load_trained_model``.
    """
    from mot_megatron.train.trained import load_trained_model

    trained = load_trained_model(path, device, options.corpus)
    for line in trained.skipped:
        say(NAME, f"skipped {line}")
    model = trained.config.model
    result = {
        "checkpoint": str(trained.checkpoint.path),
        "step": trained.checkpoint.step,
        "sees_later_tokens": model.sees_the_future,
        AS_TRAINED: measure(trained, options.sequences),
    }
    if model.sees_the_future and model.can_be_causal:
        with trained.model.routed_causally():
            result[CAUSAL] = measure(trained, options.sequences)
    return result


def measure(trained: TrainedModel, sequences: int | None) -> dict[str, Any]:
    """Return losses by modality and kind, and experts per tower, with the current routing."""
    from mot_megatron.train.label_kinds import held_out_by_kind

    with trained.model.counting_experts() as use:
        losses = held_out_by_kind(trained, sequences)
    names = dict.fromkeys(loss.modality for loss in losses)
    return {
        "modalities": {
            name: _modality([loss for loss in losses if loss.modality == name]) for name in names
        },
        "towers": {
            trained.config.model.tower_names[tower]: {
                "experts_per_token_and_layer": counted.taken / counted.tokens,
                "share_of_tokens_without_expert": counted.untaken / counted.tokens,
            }
            for tower, counted in use.items()
            if counted.tokens
        },
    }


def _modality(kinds: Sequence[KindLoss]) -> dict[str, Any]:
    """Return a modality's mean loss, and each kind's loss and share of the labels."""
    present = [loss for loss in kinds if loss.labels]
    total = sum(loss.labels for loss in present)
    mean = sum(loss.bits * loss.labels for loss in present) / total if total else math.nan
    return {
        "bits_per_token": mean,
        "labels": total,
        "kinds": {
            loss.kind: {"bits_per_token": loss.bits, "labels": loss.labels} for loss in kinds
        },
    }


def text(result: dict[str, Any]) -> str:
    """Return the result of one checkpoint as text."""
    lines = [f"checkpoint {result['checkpoint']}, step {result['step']}"]
    if not result["sees_later_tokens"]:
        return "\n".join([*lines, *_losses(result[AS_TRAINED])])
    for routing, title in TITLES.items():
        if routing in result:
            lines += ["", title, *_losses(result[routing])]
    if CAUSAL not in result:
        lines += ["", "no losses with causal routing: no causal router was trained"]
    return "\n".join(lines)


def _losses(measured: dict[str, Any]) -> list[str]:
    """Return the table of modalities, and a line per tower with experts."""
    lines = [table(measured["modalities"])]
    for tower, counted in measured["towers"].items():
        lines.append(
            f"tower {tower}: {counted['experts_per_token_and_layer']:.2f} experts per token and"
            f" layer, none for {counted['share_of_tokens_without_expert']:.1%} of the tokens"
        )
    return lines


def table(modalities: dict[str, dict[str, Any]]) -> str:
    """Return a line per modality: its loss, then loss and share of labels of each kind."""
    kinds = next(iter(modalities.values()))["kinds"]
    lines = [f"{'bits per token':<16}{'all':>8}" + "".join(f"{kind:>24}" for kind in kinds)]
    for name, losses in modalities.items():
        cells = "".join(_cell(kind, losses["labels"]) for kind in losses["kinds"].values())
        lines.append(f"{name:<16}{losses['bits_per_token']:>8.3f}{cells}")
    return "\n".join(lines)


def _cell(kind: dict[str, Any], total: int) -> str:
    labels = kind["labels"]
    shown = f"{kind['bits_per_token']:.3f} ({100 * labels / total:.1f}%)" if labels else "-"
    return f"{shown:>24}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``mot evaluate``; return the exit status."""
    return run_command(NAME, __doc__, add_arguments, run, arguments)
