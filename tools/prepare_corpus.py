"""Build a corpus of text, pictures and speech: ``prepare_corpus.py openmoji --output DIR``."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from mot_megatron.data.builders.mixed import DebPackages, build_mixed
from mot_megatron.data.builders.openmoji import build_openmoji
from mot_megatron.data.builders.stamps import build_stamps
from mot_megatron.data.corpus import Corpus
from mot_megatron.errors import UserError


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    builders = parser.add_subparsers(dest="builder", required=True)
    openmoji = builders.add_parser(
        "openmoji", help="emoji: pictures, names in eight languages, names spoken"
    )
    stamps = builders.add_parser(
        "stamps", help="stamps: pictures, captions in 40 languages, recorded speech in 14"
    )
    stamps.add_argument(
        "--deb", type=Path, required=True, help="from apt-get download tuxpaint-stamps-default"
    )
    mixed = builders.add_parser(
        "mixed", help="both of these, clip art and WordNet's glosses: 13 million tokens"
    )
    for option, package in (
        ("--stamps-deb", "tuxpaint-stamps-default"),
        ("--clipart-deb", "openclipart-svg"),
        ("--wordnet-deb", "wordnet-base"),
    ):
        mixed.add_argument(
            option, type=Path, required=True, help=f"from apt-get download {package}"
        )
    for builder in (openmoji, stamps, mixed):
        builder.add_argument("--output", type=Path, required=True, help="new or empty directory")
        builder.add_argument("--seed", type=int, default=0, help="same seed, same bytes")
        builder.add_argument("--workers", type=_positive, default=2, help="processes (default 2)")
        builder.add_argument(
            "--limit", type=_positive, help="use about this many sources only, for a quick look"
        )
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}, expected at least 1")
    return value


def main(arguments: list[str] | None = None) -> int:
    """Build; returns the exit status."""
    options = parse_arguments(arguments)
    began = time.monotonic()
    shared = {"seed": options.seed, "workers": options.workers, "limit": options.limit}
    try:
        if options.builder == "stamps":
            build_stamps(options.deb, options.output, **shared)
        elif options.builder == "mixed":
            packages = DebPackages(options.stamps_deb, options.clipart_deb, options.wordnet_deb)
            build_mixed(packages, options.output, **shared)
        else:
            build_openmoji(options.output, **shared)
        corpus = Corpus.open(options.output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, counts in corpus.description.splits.items():
        tokens = ", ".join(f"{key} {n:,}" for key, n in counts.tokens_per_modality.items())
        print(f"{name}: {counts.documents:,} documents, {counts.tokens:,} tokens ({tokens})")
    print(f"{options.output}: complete after {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
