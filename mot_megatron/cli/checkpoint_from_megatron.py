"""Start a new run from a dense GPTModel in a distributed checkpoint of megatron-core (torch_dist).

Example: mot checkpoint from-megatron iter_0001000 --config run.toml --set model.norm_eps=1e-5

The model has pre-norms (RMSNorm), SwiGLU, rotary embeddings and no biases besides those of q, k and
v. Names and shapes determine most keys of the [model] section: the configuration may leave them
out, and must not contradict them. It must state norm_eps and rotary_base, and without norms of
queries and keys also num_attention_heads and num_query_groups, because the tensors do not tell.

Towers and the vocabulary are as in ``mot checkpoint from-hf``: every tower copies the model, and
the rows of the embedding and the output head are those with the same ids, unless the folder has a
tokenizer.json. The state of the optimizer and all objects (common.pt, _extra_state), which are
pickles, are left out, counted and never read.

The command writes the folder of the run, with a checkpoint of step 0 from which training continues
and with the complete configuration, config.toml.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from mot_megatron.cli.arguments import user_path
from mot_megatron.cli.command import choose_device, run_command, say
from mot_megatron.cli.foreign_import import add_new_run, import_model

NAME = "checkpoint from-megatron"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command line; ``--config`` and ``--set`` configure the new run."""
    parser.add_argument(
        "source",
        type=user_path,
        metavar="SRC",
        help="folder of one checkpoint, with metadata.json and .distcp files",
    )
    add_new_run(parser)


def run(options: argparse.Namespace) -> int:
    """Write the run, and report its towers, its vocabulary and what was left out."""
    say(NAME, f"reading {options.source}")
    choose_device()

    from mot_megatron.conversion.megatron.source import check_stated, open_megatron

    source = open_megatron(options.source)
    import_model(source, source.kind, options, check_stated)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``mot checkpoint from-megatron``; return the exit status."""
    return run_command(NAME, __doc__, add_arguments, run, arguments)
