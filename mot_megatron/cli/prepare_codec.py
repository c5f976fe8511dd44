"""``mot prepare codec``: make a codebook file from the weights of a pretrained model."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from mot_megatron.cli.arguments import add_json, positive_int, user_path
from mot_megatron.cli.command import print_json

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np

_SOUND_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")


def add_codec(parser: argparse.ArgumentParser) -> None:
    """Add the arguments: one subcommand per codec."""
    codecs = parser.add_subparsers(dest="codec", required=True, metavar="CODEC")
    vqgan = codecs.add_parser(
        "vqgan", help="pictures: a VQGAN with the names of taming-transformers, or with LFQ or FSQ"
    )
    vqgan.add_argument(
        "--weights", type=user_path, required=True, metavar="FILE", help="a .safetensors file"
    )
    vqgan.add_argument(
        "--pixels", type=positive_int, required=True, help="width and height of the pictures"
    )
    vqgan.add_argument(
        "--quantizer",
        choices=("table", "lfq", "fsq"),
        default="table",
        help="how vectors become codes (default: the nearest entry of the table)",
    )
    vqgan.add_argument(
        "--levels",
        type=_numbers,
        default=(),
        metavar="N,...",
        help="with fsq, the levels of each component",
    )
    hubert = codecs.add_parser(
        "hubert_units", help="sound: HuBERT, wav2vec 2.0 or WavLM, and k-means of its output"
    )
    hubert.add_argument(
        "--weights",
        type=user_path,
        required=True,
        metavar="DIR",
        help="folder with config.json and model.safetensors, as transformers saves them",
    )
    hubert.add_argument(
        "--layer", type=positive_int, required=True, help="layer whose output is used, from 1"
    )
    hubert.add_argument(
        "--train-on",
        type=user_path,
        nargs="+",
        required=True,
        metavar="PATH",
        help="sounds on which the units are trained, or folders of them",
    )
    hubert.add_argument(
        "--codes", type=positive_int, default=500, metavar="N", help="units (default: 500)"
    )
    hubert.add_argument("--seed", type=int, default=0, help="seed of the units (default: 0)")
    for each in (vqgan, hubert):
        each.add_argument(
            "--output", type=user_path, required=True, metavar="FILE", help="new .safetensors file"
        )
        add_json(each)


def run_codec(options: argparse.Namespace) -> int:
    """Write the codebook file and print what it has."""
    from mot_megatron.data.codebooks import codec_class
    from mot_megatron.data.codebooks.weights import SUFFIX
    from mot_megatron.errors import DataError

    output = options.output
    if output.suffix != SUFFIX:
        raise DataError(f"--output {output}: expected a name that ends in {SUFFIX}")
    if output.exists():
        raise DataError(f"--output {output}: exists already")
    (_vqgan if options.codec == "vqgan" else _hubert)(options)
    codes = codec_class(options.codec).count_codes(output)
    if options.json:
        print_json({"output": str(output), "codec": options.codec, "codes": codes})
    else:
        print(f"{output}: {codes:,} codes of codec {options.codec}")
    return 0


def _vqgan(options: argparse.Namespace) -> None:
    from mot_megatron.data.codebooks.image import LARGEST_PIXELS
    from mot_megatron.data.codebooks.vqgan import PictureSettings, import_pictures
    from mot_megatron.data.codebooks.weights import WeightsFile
    from mot_megatron.errors import DataError

    if (options.quantizer == "fsq") != bool(options.levels):
        raise DataError("--levels: needed with --quantizer fsq, and only then")
    if options.pixels > LARGEST_PIXELS:
        raise DataError(f"--pixels {options.pixels}: expected at most {LARGEST_PIXELS}")
    settings = PictureSettings(
        pixels=options.pixels, quantizer=options.quantizer, levels=options.levels
    )
    import_pictures(WeightsFile.open(options.weights), settings, options.output)


def _hubert(options: argparse.Namespace) -> None:
    from mot_megatron.data.codebooks.hubert import import_sounds

    sounds = _sounds(options.train_on)
    import_sounds(
        options.weights, options.layer, sounds, options.codes, options.seed, options.output
    )


def _sounds(paths: Sequence[Path]) -> list[np.ndarray]:
    from mot_megatron.data.documents.decode import decode_sound
    from mot_megatron.data.documents.raw import BrokenItemError, Media
    from mot_megatron.errors import DataError

    files = []
    for path in paths:
        found = [path]
        if path.is_dir():
            found = sorted(
                each for each in path.rglob("*") if each.suffix.lower() in _SOUND_SUFFIXES
            )
            if not found:
                raise DataError(f"--train-on {path}: no {', '.join(_SOUND_SUFFIXES)} files in it")
        files += found
    sounds = []
    for file in files:
        try:
            media = Media(str(file), path=file)
            sounds.append(decode_sound(media, media.read()))
        except BrokenItemError as error:
            raise DataError(f"--train-on {error}") from None
    return sounds


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, expected numbers such as 8,5,5,5") from None
