"""Start a new run from a model in a Hugging Face format.

Example: mot checkpoint from-hf Qwen3-8B --config run.toml --set run.name=from-qwen

Known formats: Llama, Qwen2 and Qwen3 of the transformers library, BAGEL as its authors publish it
(towers und and gen), and exports of ``mot checkpoint to-hf``; weights as safetensors only. The
source determines the keys of the [model] section that describe its shapes: the configuration may
leave them out, and must not contradict them. model.modalities say which towers the run has.

Every tower copies a tower of the source: the only one, the one with the same name, or the one given
by ``--map NEW=OLD``. As with ``mot upcycle``, a tower with experts may copy one without. The
embedding and the output head get a row for every token of the corpus: that of the same token if
both sides have a tokenizer, otherwise that of the same id; the elements of new rows are drawn from
the normal distribution with the mean and standard deviation of their column.

The command writes the folder of the run, with a checkpoint of step 0 from which training continues
and with the complete configuration, config.toml. Every tensor of the source is used, or named as
left out and counted.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from mot_megatron.cli.arguments import user_path
from mot_megatron.cli.command import choose_device, run_command, say
from mot_megatron.cli.foreign_import import add_new_run, import_model

NAME = "checkpoint from-hf"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command line; ``--config`` and ``--set`` configure the new run."""
    parser.add_argument(
        "source", type=user_path, metavar="SRC", help="folder with config.json and safetensors"
    )
    add_new_run(parser)


def run(options: argparse.Namespace) -> int:
    """Write the run, and report its towers, its vocabulary and what was left out."""
    say(NAME, f"reading {options.source}")
    choose_device()

    from mot_megatron.conversion.huggingface.foreign import open_foreign

    source = open_foreign(options.source)
    import_model(source, source.kind, options)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``mot checkpoint from-hf``; return the exit status."""
    return run_command(NAME, __doc__, add_arguments, run, arguments)
