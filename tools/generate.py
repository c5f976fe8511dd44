"""Continue a prompt into text, images and speech with a trained model.

Text is printed; every item is also written to the output folder, as MODALITY-NUMBER.txt, .png or
.wav. Example: generate.py --checkpoint runs/quickstart --prompt "red heart" --output samples
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

# DeepSpeed's note about a machine without a GPU would bury the one line a user has to read.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

from mot_megatron.config import ModelConfig
from mot_megatron.data.codebooks.text import TextCodec
from mot_megatron.errors import DataError, UserError
from mot_megatron.generation.generate import Generator
from mot_megatron.generation.sampling import SamplingSettings
from mot_megatron.train.trained import load_trained_model


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    defaults = SamplingSettings()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        help="a run's folder, its checkpoints folder (newest is taken) or one step's folder",
    )
    parser.add_argument(
        "--prompt", required=True, help="text; special tokens such as <bos> may stand in it"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument(
        "--into",
        action="append",
        metavar="MODALITY",
        help="what to generate; may be repeated (default: each modality of the corpus)",
    )
    parser.add_argument(
        "--language", help="of the prompt, as the corpus names it (default: en if it is there)"
    )
    parser.add_argument(
        "--samples", type=int, default=defaults.num_samples, help="items of each modality"
    )
    parser.add_argument(
        "--temperature", type=float, default=defaults.temperature, help="0: always the likeliest"
    )
    parser.add_argument("--top-k", type=int, help="draw among the K likeliest tokens only")
    parser.add_argument(
        "--top-p",
        type=float,
        default=defaults.top_p,
        help="draw among the fewest tokens that hold this probability",
    )
    parser.add_argument("--seed", type=int, default=defaults.seed, help="same seed, same samples")
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=defaults.max_tokens,
        help=f"longest item where lengths vary (default {defaults.max_tokens})",
    )
    parser.add_argument(
        "--corpus", type=Path, help="the model's corpus, if it has moved since training"
    )
    return parser.parse_args(arguments)


def generate_files(options: argparse.Namespace) -> None:
    """Load, generate and write."""
    settings = SamplingSettings(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        num_samples=options.samples,
        max_tokens=options.max_tokens,
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained = load_trained_model(options.checkpoint, device, options.corpus)
    for line in trained.skipped:
        print(f"skipped {line}", file=sys.stderr)
    print(f"checkpoint {trained.checkpoint.path}, step {trained.checkpoint.step}")
    generator = Generator(trained.model, trained.corpus, trained.config.data.seq_length)
    if trained.config.model.sees_the_future:
        print(_how_tokens_are_routed(trained.config.model))
    # A later modality's wrong name should not show only after an earlier one was generated.
    modalities = [generator.rules(name).modality.name for name in options.into or generator.codecs]
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        for name in modalities:
            items = generator.continue_text(options.prompt, name, settings, options.language)
            for number, item in enumerate(items, start=1):
                path = options.output / f"{name}-{number}{item.codec.suffix}"
                item.write(path)
                shown = f"  {item.media}" if isinstance(item.codec, TextCodec) else ""
                print(f"{path}: {len(item.token_ids)} tokens{shown}")
    except OSError as error:
        raise DataError(f"{options.output}: cannot be written: {error.strerror}") from error


def _how_tokens_are_routed(model: ModelConfig) -> str:
    """By what other than in training: there, later tokens had a say."""
    if any(experts and experts.causal_router for experts in model.experts_of_towers):
        return "tokens are routed by the causal router"
    return "tokens are routed without a capacity: no expert drops any"


def main(arguments: list[str] | None = None) -> int:
    """Generate; returns the exit status."""
    options = parse_arguments(arguments)
    try:
        generate_files(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
