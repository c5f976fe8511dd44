"""Make a new run from a trained model: a tower per modality, or a mixture of experts, from copies.

Example: upcycle.py --from runs/dense --config configs/compare/base.toml
             --config configs/compare/mot.toml

Writes the folder of the configuration's run, with a checkpoint of step 0, from which
launch/train.py goes on with the same configuration. Every tower of it copies a tower of the source:
the only one, the one of its name, or what ``--map NEW=OLD`` says. Where it has experts and the
source's tower has none, each expert is a copy of that tower's feed-forward network, and routers are
drawn from run.seed; a mixture is copied as it is, and never gets fewer experts or more. Only
weights are taken over: the optimizer's moments, the position in the data, the learning rate's
schedule and the counts of steps, tokens and FLOPs begin anew.

Copies alone change nothing of what the model computes. Nor do experts whose weights sum to one:
softmax gates of all experts (expert choice with capacity_factor = num_moe_experts, or topk =
num_moe_experts), and sigmoid gates of topk of two or more, which are divided by their sum.
Otherwise the network's output comes multiplied by the sum of a token's gates, at first about: topk
* 1/E or 1/2 (softmax, sigmoid), for expert choice capacity_factor times that on average, and 0 for
a token that no expert takes. Where the norm stands behind the network (norm_placement = "post") it
cancels any factor but 0, up to norm_eps. The tool says of every tower which of these its weights
are, and of the whole model whether it computes what the source does: it does not where attention
carries one tower's difference to the others, or a modality's tokens run through copies of another
tower than before. ``--check`` runs both models on a held-out sequence and prints the largest
difference of their logits.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

# DeepSpeed's note about a machine without a GPU would bury what the tool says.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

from mot_megatron.config_files import load_config
from mot_megatron.data.corpus import Corpus
from mot_megatron.errors import ConfigError, UserError
from mot_megatron.train.session import resolve_config
from mot_megatron.train.trained import SavedRun
from mot_megatron.train.upcycle import compare_logits, upcycle
from mot_megatron.train.upcycle_plan import first_forwards, source_towers, whole_model


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        required=True,
        metavar="CHECKPOINT",
        help="a run's folder, its checkpoints folder (newest is taken) or one step's folder",
    )
    parser.add_argument(
        "--config",
        type=Path,
        action="append",
        required=True,
        help="of the new run; of several, later ones override earlier ones",
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override a key of the configuration; may be repeated",
    )
    parser.add_argument(
        "--map",
        dest="towers",
        nargs="+",
        action="extend",
        default=[],
        metavar="NEW=OLD",
        help="a tower of the new run and the tower of the source that it copies",
    )
    parser.add_argument(
        "--check", action="store_true", help="compare both models' logits on a held-out sequence"
    )
    return parser.parse_args(arguments)


def parse_towers(entries: list[str]) -> dict[str, str]:
    """``NEW=OLD`` entries as a dictionary.

    Raises:
        ConfigError: one is not of that form, or two are of the same tower.
    """
    towers: dict[str, str] = {}
    for entry in entries:
        new, equals, old = entry.partition("=")
        if not (new and equals and old):
            raise ConfigError(f"--map {entry}: expected NEW=OLD, the names of two towers")
        if new in towers:
            raise ConfigError(f"--map {entry}: tower {new} copies {towers[new]} already")
        towers[new] = old
    return towers


def run(options: argparse.Namespace) -> None:
    """Copy, and say what became of each tower."""
    config = load_config(options.config, options.overrides)
    corpus = Corpus.open(config.data.corpus)
    config = resolve_config(config, corpus)
    source = SavedRun.open(options.source)
    source.check_corpus(corpus, "data.corpus")
    for line in source.skipped:
        print(f"skipped {line}", file=sys.stderr)
    old, new = source.config.model, config.model
    towers = source_towers(old, new, parse_towers(options.towers))
    checkpoint = upcycle(source, config, corpus, towers)
    print(f"from {source.checkpoint.path}, step {source.checkpoint.step}")
    forwards = first_forwards(old, new, towers)
    for forward in forwards:
        print(forward)
    print(whole_model(old, new, towers, forwards))
    print(f"{checkpoint.path}: {checkpoint.num_tensors} tensors, step 0; weights only")
    if options.check:
        difference = compare_logits(source, checkpoint, corpus)
        print(
            f"logits of {difference.tokens} held-out tokens differ by at most"
            f" {difference.largest:.3g} (largest logit {difference.scale:.3g})"
        )


def main(arguments: list[str] | None = None) -> int:
    """Make the run; 2 after bad input."""
    try:
        run(parse_arguments(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
