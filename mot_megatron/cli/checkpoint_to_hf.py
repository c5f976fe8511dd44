"""Export a checkpoint to a folder that Hugging Face transformers loads.

Example: mot checkpoint to-hf runs/mot exported --dtype bfloat16

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

from mot_megatron.cli.arguments import add_moved_corpus, user_path
from mot_megatron.cli.command import choose_device, run_command, say
from mot_megatron.errors import ConfigError

NAME = "checkpoint to-hf"
DTYPES = ("float32", "bfloat16", "float16")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command line."""
    parser.add_argument(
        "source", type=user_path, metavar="SRC", help="folder of a run or of a checkpoint"
    )
    parser.add_argument("directory", type=user_path, metavar="DST", help="folder to write, new")
    add_moved_corpus(parser)
    parser.add_argument(
        "--dtype", choices=DTYPES, help="type of the weights; default: as in the checkpoint"
    )
    parser.add_argument(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="size of the weight files, as 500MB or 5GB (default: %(default)s)",
    )
    parser.add_argument("--dry-run", action="store_true", help="only print what would be written")
    parser.add_argument(
        "--verify", action="store_true", help="read the files back and compare every tensor"
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

    import torch

    from mot_megatron.conversion.huggingface.export import plan_export, write_export
    from mot_megatron.conversion.huggingface.safetensors_files import SafetensorsSource
    from mot_megatron.conversion.source import CheckpointSource
    from mot_megatron.conversion.verify import verify_outputs
    from mot_megatron.data.corpus import Corpus
    from mot_megatron.train.trained import SavedRun

    source = CheckpointSource(options.source)
    for line in source.skipped:
        say(NAME, f"skipped {line}")
    corpus = Corpus.open_vocabulary(options.corpus or source.config.data.corpus)
    SavedRun(source.checkpoint, source.config, ()).check_corpus(corpus, "--corpus")
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    plan = plan_export(source, corpus, dtype, shard_bytes)
    print(f"from {source.checkpoint.path}, step {source.checkpoint.step}: {plan.model_type}")
    for what, count in plan.left_out.items():
        print(f"left out: {count} tensors, {what}")
    outputs = plan.outputs
    size = sum(output.info.num_bytes for output in outputs)
    summary = f"{options.directory}: {len(outputs)} tensors, {size:,} bytes"
    if options.dry_run:
        print(f"would write {summary}, {len(plan.shards)} files of weights")
        return 0
    manifest = write_export(plan, options.directory)
    print(f"{summary}, {len(plan.shards)} files of weights; {len(manifest.files)} files")
    if options.verify:
        written = SafetensorsSource(options.directory)
        count = verify_outputs(outputs, written, str(options.directory))
        print(f"verified: {count} tensors are equal bit for bit")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``mot checkpoint to-hf``; return the exit status."""
    return run_command(NAME, __doc__, add_arguments, run, arguments)
