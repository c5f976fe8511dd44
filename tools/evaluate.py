"""Held-out loss of a trained model by kind of label: special tokens, the most common code, others.

Prints bits per token of every modality; of a model whose routing sees later tokens a second table,
routed causally; of towers with experts how many of them a token runs through.
Example: evaluate.py runs/quickstart
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

# DeepSpeed's note about a machine without a GPU would bury the table.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

from mot_megatron.errors import ConfigError, UserError
from mot_megatron.train.label_kinds import KINDS, KindLoss, held_out_by_kind
from mot_megatron.train.trained import TrainedModel, load_trained_model


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "checkpoint",
        type=Path,
        help="a run's folder, its checkpoints folder (newest is taken) or one step's folder",
    )
    parser.add_argument(
        "--sequences", type=int, help="packed sequences of the validation split (default: all)"
    )
    parser.add_argument(
        "--corpus", type=Path, help="the model's corpus, if it has moved since training"
    )
    return parser.parse_args(arguments)


def evaluate(options: argparse.Namespace) -> None:
    """Load, evaluate and print.

    Raises:
        ConfigError: no number of sequences that can be evaluated.
        UserError: see ``load_trained_model``.
    """
    if options.sequences is not None and options.sequences < 1:
        raise ConfigError(f"--sequences {options.sequences}: needed: 1 or more")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained = load_trained_model(options.checkpoint, device, options.corpus)
    for line in trained.skipped:
        print(f"skipped {line}", file=sys.stderr)
    print(f"checkpoint {trained.checkpoint.path}, step {trained.checkpoint.step}")
    model = trained.config.model
    if not model.sees_the_future:
        print_losses(trained, options.sequences)
        return
    print("\nrouted as in training, where a token's experts depend on later tokens")
    print_losses(trained, options.sequences)
    if model.can_be_causal:
        print("\nrouted causally, as in generation")
        with trained.model.routed_causally():
            print_losses(trained, options.sequences)
    else:
        print("\nnot routed causally: no causal router was trained")


def print_losses(trained: TrainedModel, sequences: int | None) -> None:
    """Evaluate as the model is routed at the moment; print losses, and what experts took."""
    with trained.model.counting_experts() as use:
        print(table(held_out_by_kind(trained, sequences)))
    for tower, counted in use.items():
        if counted.tokens == 0:
            continue
        print(
            f"tower {trained.config.model.tower_names[tower]}:"
            f" {counted.taken / counted.tokens:.2f} experts per token and layer,"
            f" none for {counted.untaken / counted.tokens:.1%} of the tokens"
        )


def table(losses: Sequence[KindLoss]) -> str:
    """One line per modality: bits per token of all its labels, then of each kind and its share."""
    columns = "".join(f"{kind:>24}" for kind in KINDS)
    lines = [f"{'bits per token':<16}{'all':>8}{columns}"]
    for modality in dict.fromkeys(loss.modality for loss in losses):
        kinds = [loss for loss in losses if loss.modality == modality]
        present = [loss for loss in kinds if loss.labels]
        total = sum(loss.labels for loss in present)
        mean = sum(loss.bits * loss.labels for loss in present) / total if total else float("nan")
        cells = "".join(
            f"{f'{loss.bits:.3f} ({100 * loss.labels / total:.1f}%)' if loss.labels else '-':>24}"
            for loss in kinds
        )
        lines.append(f"{modality:<16}{mean:>8.3f}{cells}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Evaluate; returns the exit status."""
    try:
        evaluate(parse_arguments(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
