"""Export a checkpoint to a folder that Hugging Face transformers loads.

Example: mot checkpoint to-hf runs/mot exported --dtype bf16

A dense pre-norm model becomes a Qwen3 (with norms of queries and keys), a Qwen2 (with biases) or a
Llama; transformers computes the same logits. Any other model is exported with its modelling file
and loads with trust_remote_code=True. The folder has the weights as safetensors, config.json, the
tokenizer, and the corpus's description and codebooks, from which ``mot checkpoint from-hf`` brings
it back. The optimizer's moments have no place there; they are counted.

The folder is written under a temporary name, with a manifest of all files, and renamed when it is
complete. No model is built: the tensors are read and written one after the other.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

from mot_megatron.cli.arguments import add_moved_corpus
from mot_megatron.cli.command import choose_device, run_command
from mot_megatron.cli.export import add_export, dtype_of, export, open_source
from mot_megatron.errors import ConfigError

NAME = "checkpoint to-hf"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command line."""
    add_export(parser)
    add_moved_corpus(parser)
    parser.add_argument(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="size of the weight files, as 500MB or 5GB (default: %(default)s)",
    )


def parse_size(text: str) -> int:
    """Parse a size in bytes, as 500MB or 5GB."""
    found = re.fullmatch(r"(\d{1,15})\s*([KMG]B|)", text.strip(), re.IGNORECASE)
    size = int(found[1]) * _UNITS[found[2].upper()] if found else 0
    if size == 0:
        raise ConfigError(f"--max-shard-size {text}: expected a size above 0, as 500MB or 5GB")
    return size


def run(options: argparse.Namespace) -> int:
    """Export the checkpoint, and report the files and what was left out."""
    shard_bytes = parse_size(options.max_shard_size)
    choose_device()

    from mot_megatron.conversion.huggingface.export import plan_export, write_export
    from mot_megatron.data.corpus import Corpus
    from mot_megatron.train.trained import SavedRun

    source = open_source(NAME, options.source)
    corpus = Corpus.open_vocabulary(options.corpus or source.config.data.folders[0])
    SavedRun(source.checkpoint, source.config, ()).check_corpus(corpus, "--corpus")
    plan = plan_export(source, corpus, dtype_of(options), shard_bytes)
    print(f"from {source.checkpoint.path}, step {source.checkpoint.step}: {plan.model_type}")
    size = f"{plan.num_bytes / 1e9:.3f} GB"
    weights = f"{len(plan.outputs)} weights, {size}, in {len(plan.shards)} files"
    return export(options, plan, weights, write_export)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``mot checkpoint to-hf``; return the exit status."""
    return run_command(NAME, __doc__, add_arguments, run, arguments)
