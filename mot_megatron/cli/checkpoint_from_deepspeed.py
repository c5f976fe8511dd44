"""Start a new run from the weights of a DeepSpeed checkpoint.

Example: mot checkpoint from-deepspeed output/checkpoint-500 --config run.toml

Known are universal checkpoints and those of ZeRO-1, 2 and 3 on any number of data-parallel ranks,
of models with the names of Llama, Qwen2 or Qwen3 in the transformers library, which may all begin
with a prefix such as ``module.``. A folder of checkpoints with a file ``latest`` stands for the one
that it names. The weights are the optimizer's, in fp32, where optimizer states are there. Moments,
learning rates and data position are not taken: the run begins at step 0.

A DeepSpeed checkpoint does not describe its architecture: ``--architecture`` names the model's
config.json, or the folder with it and, if there is one, with tokenizer.json. By default that is
the checkpoint's folder or the one above. Everything else is as with ``mot checkpoint from-hf``.

The files are pickles, which can run any program. They are read without: names, shapes and places of
tensors are taken from them, and a file that refers to anything else is refused.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from mot_megatron.cli.arguments import user_path
from mot_megatron.cli.command import choose_device, run_command, say
from mot_megatron.cli.foreign_import import add_new_run, import_model

NAME = "checkpoint from-deepspeed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command line; ``--config`` and ``--set`` configure the new run."""
    parser.add_argument(
        "source", type=user_path, metavar="SRC", help="checkpoint, or folder with a file latest"
    )
    parser.add_argument(
        "--architecture",
        type=user_path,
        metavar="PATH",
        help="config.json of the model, or the folder with it (default: SRC, or that above it)",
    )
    add_new_run(parser)


def run(options: argparse.Namespace) -> int:
    """Write the run, and report its towers, its vocabulary and what was left out."""
    say(NAME, f"reading {options.source}")
    choose_device()

    from mot_megatron.conversion.deepspeed_source import DeepSpeedSource, find_architecture
    from mot_megatron.conversion.huggingface.foreign import open_described

    tensors = DeepSpeedSource(options.source)
    path = find_architecture(options.architecture, tensors.directory)
    source = open_described(tensors.directory, path, lambda: tensors)
    prefix = f", names after {tensors.prefix!r}" if tensors.prefix else ""
    format_name = f"{source.kind}, DeepSpeed checkpoint ({tensors.description}){prefix}"
    import_model(source, format_name, options)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``mot checkpoint from-deepspeed``; return the exit status."""
    return run_command(NAME, __doc__, add_arguments, run, arguments)
