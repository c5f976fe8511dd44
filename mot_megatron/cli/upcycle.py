"""Make a new run from a trained model by copying its weights to more towers or to experts.

Example: mot upcycle --checkpoint runs/dense --config base.toml --config mot.toml --check

This writes the folder of the run in the configuration, with a checkpoint of step 0 from which
training continues with the same configuration. Each new tower is a copy of a tower of the source:
the only one, the one with the same name, or the one given by ``--map NEW=OLD``. If the new tower
has experts and the old one has none, every expert is a copy of the old feed-forward network, and
routers are initialized with run.seed. Existing experts are copied; their number cannot change. Only
weights are copied: optimizer moments, data position, learning-rate schedule and the counts of
steps, tokens and FLOPs start anew.

A plain copy computes the same as the source. So do experts whose gates sum to one: softmax gates if
every expert takes every token (expert choice with capacity_factor = num_moe_experts, or topk =
num_moe_experts), and sigmoid gates with topk of at least two, which are normalized. In other cases,
the output of the feed-forward network is multiplied by the sum of a token's gates. Initially, that
is about topk / E (softmax) or 1/2 (sigmoid); with expert choice, it is capacity_factor times that
on average, and 0 for a token that no expert takes. A norm after the network (norm_placement =
"post") cancels every factor except 0, up to norm_eps.

The command reports for every tower whether its weights compute the same as those of the source, and
for the whole model whether the first forward pass is the same. It is not if one tower differs,
since attention propagates the difference to all others, or if a modality now uses a copy of another
tower than before. ``--check`` runs both models on a held-out sequence and prints the largest
difference between their logits.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from mot_megatron.cli.arguments import add_checkpoint, add_config
from mot_megatron.cli.command import choose_device, run_command, say
from mot_megatron.errors import ConfigError

NAME = "upcycle"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command line; ``--config`` and ``--set`` configure the new run."""
    add_checkpoint(parser)
    add_config(parser)
    add_map(parser)
    parser.add_argument(
        "--check", action="store_true", help="compare both models' logits on a held-out sequence"
    )


def add_map(parser: argparse.ArgumentParser) -> None:
    """Add ``--map``, whose values ``parse_towers`` reads."""
    parser.add_argument(
        "--map",
        dest="towers",
        nargs="+",
        action="extend",
        default=[],
        metavar="NEW=OLD",
        help="tower of the new run, and the tower of the source that it copies",
    )


def parse_towers(entries: list[str]) -> dict[str, str]:
    """Parse ``NEW=OLD`` entries into a dictionary.

    Raises:
        ConfigError: An entry has another form, or two entries have the same new tower.
    """
    towers: dict[str, str] = {}
    for entry in entries:
        new, equals, old = entry.partition("=")
        if not (new and equals and old):
            raise ConfigError(f"--map {entry}: expected NEW=OLD, the names of two towers")
        if new in towers:
            raise ConfigError(f"--map {entry}: tower {new} is already a copy of {towers[new]}")
        towers[new] = old
    return towers


def run(options: argparse.Namespace) -> int:
    """Copy the weights, and report whether each tower computes the same as before."""
    say(NAME, f"reading {options.checkpoint}")
    choose_device()

    from mot_megatron.config_files import load_config
    from mot_megatron.data.blend import open_training_data
    from mot_megatron.train.session import resolve_config
    from mot_megatron.train.trained import SavedRun
    from mot_megatron.train.upcycle import compare_logits, upcycle
    from mot_megatron.train.upcycle_plan import first_forwards, source_towers, whole_model

    config = load_config(options.config, options.overrides)
    corpus = open_training_data(config.data)
    config = resolve_config(config, corpus)
    source = SavedRun.open(options.checkpoint)
    source.check_corpus(corpus, "data.corpus")
    for line in source.skipped:
        say(NAME, f"skipped {line}")
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
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``mot upcycle``; return the exit status."""
    return run_command(NAME, __doc__, add_arguments, run, arguments)
