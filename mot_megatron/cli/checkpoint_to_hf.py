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

from mot_megatron.cli.arguments import (
    CHECKPOINT_HELP,
    add_moved_corpus,
    add_verify_and_dry_run,
    user_path,
)
from mot_megatron.cli.command import choose_device, run_command, say
from mot_megatron.errors import ConfigError

NAME = "checkpoint to-hf"
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command line."""
    parser.add_argument("source", type=user_path, metavar="SRC", help=CHECKPOINT_HELP)
    parser.add_argument("destination", type=user_path, metavar="DST", help="new folder to write")
    add_moved_corpus(parser)
    parser.add_argument(
        "--dtype", choices=DTYPES, help="convert the weights (default: keep their dtype)"
    )
    parser.add_argument(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="size of the weight files, as 500MB or 5GB (default: %(default)s)",
    )
    add_verify_and_dry_run(parser)


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

    import torch

    from mot_megatron.conversion.folder import check_new
    from mot_megatron.conversion.huggingface.export import plan_export, write_export
    from mot_megatron.conversion.source import CheckpointSource
    from mot_megatron.data.corpus import Corpus
    from mot_megatron.train.trained import SavedRun

    source = CheckpointSource(options.source)
    for line in source.skipped:
        say(NAME, f"skipped {line}")
    corpus = Corpus.open_vocabulary(options.corpus or source.config.data.corpus)
    SavedRun(source.checkpoint, source.config, ()).check_corpus(corpus, "--corpus")
    dtype = None if options.dtype is None else getattr(torch, DTYPES[options.dtype])
    plan = plan_export(source, corpus, dtype, shard_bytes)
    print(f"from {source.checkpoint.path}, step {source.checkpoint.step}: {plan.model_type}")
    for what, count in plan.left_out.items():
        print(f"left out: {count} tensors, {what}")
    check_new(options.destination, plan.num_bytes)
    print(
        f"{len(plan.outputs)} weights, {plan.num_bytes / 1e9:.3f} GB, in {len(plan.shards)} files"
    )
    if options.dry_run:
        print("nothing was written (--dry-run)")
        return 0
    manifest = write_export(plan, options.destination, options.verify)
    compared = ", compared with the source" if options.verify else ""
    print(f"{options.destination}: {len(manifest.files)} files{compared}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``mot checkpoint to-hf``; return the exit status."""
    return run_command(NAME, __doc__, add_arguments, run, arguments)
