"""Continue a prompt into text, images and speech with a trained model.

Text is printed. Every item is also written to the output folder, as MODALITY-NUMBER.txt, .png or
.wav. Pictures are enlarged without smoothing until the longer side has at least 256 pixels. With
--ids, the prompt and the items are token ids, which needs no codec.

Example: mot generate --checkpoint runs/quickstart --prompt "red heart" --output samples
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mot_megatron.cli.arguments import (
    add_checkpoint,
    add_moved_corpus,
    add_output,
    positive_int,
)
from mot_megatron.cli.command import choose_device, run_command, say
from mot_megatron.errors import DataError

if TYPE_CHECKING:
    from mot_megatron.config_model import ModelConfig
    from mot_megatron.generation.generate import Generator, Item
    from mot_megatron.generation.sampling import SamplingSettings

NAME = "generate"
LEAST_PIXELS = 256
"""Minimum pixels of the longer side of a written picture, unless --image-scale is given."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command line."""
    add_checkpoint(parser)
    parser.add_argument(
        "--prompt", required=True, help="text; may contain special tokens such as <bos>"
    )
    parser.add_argument(
        "--ids",
        action="store_true",
        help='the prompt is token ids, as in "1 5 17", and items are written as token ids, to'
        " MODALITY-NUMBER.ids.txt",
    )
    add_output(parser, "folder to write to")
    parser.add_argument(
        "--into",
        action="append",
        metavar="MODALITY",
        help="what to generate; may be repeated (default: each modality of the corpus)",
    )
    parser.add_argument(
        "--language",
        help="language of the prompt, as the corpus names it (default: en if the corpus has it)",
    )
    parser.add_argument("--samples", type=int, help="items per modality (default 1)")
    parser.add_argument(
        "--temperature", type=float, help="0: always the most likely token (default 1)"
    )
    parser.add_argument("--top-k", type=int, help="sample from the K most likely tokens only")
    parser.add_argument(
        "--top-p",
        type=float,
        help="sample from the fewest tokens whose probabilities sum to at least P (default 1)",
    )
    parser.add_argument("--seed", type=int, help="the same seed gives the same samples (default 0)")
    parser.add_argument(
        "--max-tokens",
        type=int,
        help="maximum length of an item, for modalities with varying lengths (default 256)",
    )
    parser.add_argument(
        "--image-scale",
        type=positive_int,
        metavar="N",
        help="enlarge written pictures N times; 1 keeps the model's pixels"
        f" (default: until the longer side has {LEAST_PIXELS} pixels)",
    )
    add_moved_corpus(parser)


def run(options: argparse.Namespace) -> int:
    """Load the model, generate samples and write them."""
    say(NAME, f"loading {options.checkpoint}")
    device = choose_device()

    from mot_megatron.generation.generate import Generator
    from mot_megatron.train.trained import load_trained_model

    settings = sampling_settings(options)
    if options.ids:
        parse_ids(options.prompt)  # refuse it before the model is loaded
    trained = load_trained_model(options.checkpoint, device, options.corpus)
    for line in trained.skipped:
        say(NAME, f"skipped {line}")
    print(f"checkpoint {trained.checkpoint.path}, step {trained.checkpoint.step}")
    generator = Generator(trained.model, trained.corpus, trained.config.data.seq_length)
    if trained.config.model.sees_the_future:
        print(_routing_note(trained.config.model))
    write = write_ids if options.ids else write_samples
    try:
        write(generator, settings, options)
    except OSError as error:
        raise DataError(f"{options.output}: cannot be written: {error.strerror}") from error
    return 0


def sampling_settings(options: argparse.Namespace) -> SamplingSettings:
    """Return the sampling settings, with defaults for options that were not given."""
    from mot_megatron.generation.sampling import SamplingSettings

    given = {
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "seed": options.seed,
        "num_samples": options.samples,
        "max_tokens": options.max_tokens,
    }
    return SamplingSettings(**{key: value for key, value in given.items() if value is not None})


def write_samples(
    generator: Generator, settings: SamplingSettings, options: argparse.Namespace
) -> None:
    """Generate items of every modality, write them and print a line for each.

    Raises:
        UserError: The prompt, a modality or the language is invalid.
        OSError: A file cannot be written.
    """
    from mot_megatron.data.codebooks.text import TextCodec

    # Check all names first, so that a wrong one is reported before minutes of generation.
    wanted = options.into or generator.codecs or _all_modalities(generator)
    for name in [generator.rules(name).modality.name for name in wanted]:
        items = generator.continue_text(options.prompt, name, settings, options.language)
        # Not before: a prompt that is refused leaves no folder.
        options.output.mkdir(parents=True, exist_ok=True)
        for number, item in enumerate(items, start=1):
            path = options.output / f"{name}-{number}{item.codec.suffix}"
            write_item(item, path, options.image_scale)
            shown = f"  {item.media}" if isinstance(item.codec, TextCodec) else ""
            print(f"{path}: {len(item.token_ids)} tokens{shown}", flush=True)


def write_ids(
    generator: Generator, settings: SamplingSettings, options: argparse.Namespace
) -> None:
    """Continue a prompt of token ids in every modality and write the items as token ids.

    Raises:
        UserError: The prompt or a modality is invalid.
        OSError: A file cannot be written.
    """
    import numpy as np

    prompt = np.array(parse_ids(options.prompt), dtype=np.int64)
    wanted = options.into or _all_modalities(generator)
    for name in [generator.rules_of_ids(name).modality.name for name in wanted]:
        items = generator.continue_ids(prompt, name, settings)
        options.output.mkdir(parents=True, exist_ok=True)
        for number, ids in enumerate(items, start=1):
            path = options.output / f"{name}-{number}.ids.txt"
            path.write_text(" ".join(map(str, ids.tolist())) + "\n", encoding="ascii")
            print(f"{path}: {len(ids)} tokens", flush=True)


def parse_ids(prompt: str) -> list[int]:
    """Read token ids separated by spaces or commas.

    Raises:
        DataError: There is none, or one is not a number.
    """
    words = prompt.replace(",", " ").split()
    wrong = next((word for word in words if not (word.isascii() and word.isdigit())), None)
    if wrong is not None or not words:
        raise DataError(f"--prompt {prompt!r} with --ids: expected token ids, as in '1 5 17'")
    # No vocabulary needs more digits; Python refuses to parse thousands of them.
    return [int(word[:18]) for word in words]


def _all_modalities(generator: Generator) -> list[str]:
    return [modality.name for modality in generator.corpus.description.modalities]


def write_item(item: Item, path: Path, image_scale: int | None = None) -> None:
    """Write an item; in a picture, every pixel becomes a square of ``image_scale`` pixels a side.

    By default, this is the smallest factor that gives the longer side at least 256 pixels.
    """
    from PIL import Image

    from mot_megatron.data.codebooks.codec import PictureCodec

    if not isinstance(item.codec, PictureCodec):
        item.write(path)
        return
    picture = Image.fromarray(item.media)
    factor = image_scale or -(-LEAST_PIXELS // max(picture.size))
    size = (picture.width * factor, picture.height * factor)
    picture.resize(size, Image.Resampling.NEAREST).save(path)


def _routing_note(model: ModelConfig) -> str:
    """Return a note on routing, for a model whose routing in training depends on later tokens."""
    if any(experts and experts.causal_router for experts in model.experts_of_towers):
        return "tokens are routed by the causal router"
    return "tokens are routed without a capacity limit: no expert drops tokens"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``mot generate``; return the exit status."""
    return run_command(NAME, __doc__, add_arguments, run, arguments)
