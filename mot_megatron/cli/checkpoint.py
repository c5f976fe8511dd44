"""``mot checkpoint``: dispatch to the tools for checkpoints, which are separate commands."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mot_megatron.cli.main import Command, dispatch

CONVERSIONS = {
    "inspect": Command("checkpoint_inspect", "show what a checkpoint contains, or compare two"),
    "reshard": Command("checkpoint_reshard", "lay the files out as another layout reads them"),
    "to-hf": Command("checkpoint_to_hf", "export to a folder that Hugging Face transformers loads"),
    "from-hf": Command("checkpoint_from_hf", "start a run from Llama, Qwen, BAGEL or an export"),
    "from-deepspeed": Command(
        "checkpoint_from_deepspeed", "start a run from the weights of a DeepSpeed checkpoint"
    ),
    "to-megatron": Command("checkpoint_to_megatron", "export a dense model to megatron-core"),
    "from-megatron": Command("checkpoint_from_megatron", "start a run from a dense GPTModel"),
    "weights": Command("checkpoint_weights", "write the weights alone, or the mean of several"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``mot checkpoint``; return the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    return dispatch("mot checkpoint", CONVERSIONS, given)
