"""Build a corpus of text, images and speech, or make a codebook file for one.

Examples:
  mot prepare documents photos.jsonl --output corpora/photos
  mot prepare openmoji --output corpora/openmoji
  mot prepare codec vqgan --weights vqgan.safetensors --pixels 256 --output image.safetensors
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mot_megatron.cli.arguments import add_json, add_output, positive_int, user_path
from mot_megatron.cli.command import print_json, run_command, say
from mot_megatron.cli.prepare_codec import add_codec, run_codec
from mot_megatron.cli.prepare_documents import (
    add_documents,
    add_megatron,
    document_build,
    special_names,
)

if TYPE_CHECKING:
    from mot_megatron.data.corpus import Corpus

NAME = "prepare"
DEB_PACKAGES = {
    "--stamps-deb": "tuxpaint-stamps-default",
    "--clipart-deb": "openclipart-svg",
    "--wordnet-deb": "wordnet-base",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command line: one subcommand per corpus."""
    corpora = parser.add_subparsers(dest="builder", required=True, metavar="CORPUS")
    add_documents(
        corpora.add_parser(
            "documents", help="your own files: JSONL, text, WebDataset, Parquet, datasets"
        )
    )
    add_megatron(
        corpora.add_parser("megatron", help="existing .bin and .idx of text, which are linked")
    )
    add_codec(
        corpora.add_parser("codec", help="no corpus: a codebook file from a pretrained model")
    )
    openmoji = corpora.add_parser(
        "openmoji", help="emoji: pictures, names in eight languages, names spoken"
    )
    stamps = corpora.add_parser(
        "stamps", help="stamps: pictures, captions in 40 languages, recorded speech in 14"
    )
    _add_deb(stamps, "--deb", DEB_PACKAGES["--stamps-deb"])
    mixed = corpora.add_parser(
        "mixed", help="both of these, clip art and glosses from WordNet: 13 million tokens"
    )
    for option, package in DEB_PACKAGES.items():
        _add_deb(mixed, option, package)
    for corpus in (openmoji, stamps, mixed):
        add_output(corpus, "new or empty folder")
        corpus.add_argument(
            "--seed", type=int, default=0, help="the same seed gives the same bytes (default 0)"
        )
        corpus.add_argument("--workers", type=positive_int, default=2, help="processes (default 2)")
        corpus.add_argument(
            "--limit",
            type=positive_int,
            metavar="N",
            help="use only about N sources, for a quick test",
        )
        add_json(corpus)


def _add_deb(parser: argparse.ArgumentParser, option: str, package: str) -> None:
    parser.add_argument(
        option,
        type=user_path,
        required=True,
        metavar="FILE",
        help=f"package file from: apt-get download {package}",
    )


def run(options: argparse.Namespace) -> int:
    """Build the corpus and print its counts, or make the codebook file."""
    if options.builder == "codec":
        return run_codec(options)
    began = time.monotonic()
    say(NAME, f"building {options.output}")
    corpus = build(options)
    seconds = time.monotonic() - began
    if options.json:
        print_json(counts(corpus) | {"output": str(options.output), "seconds": seconds})
        return 0
    for name, split in corpus.description.splits.items():
        tokens = ", ".join(f"{key} {n:,}" for key, n in split.tokens_per_modality.items())
        print(f"{name}: {split.documents:,} documents, {split.tokens:,} tokens ({tokens})")
        if split.context is not None:
            only = sum(split.context.tokens_per_modality.values())
            print(f"  of these, {only:,} are context only")
    print(f"{options.output}: complete after {seconds:.0f} s")
    return 0


def build(options: argparse.Namespace) -> Corpus:
    """Build the corpus selected by the options, and open it."""
    from mot_megatron.data.corpus import Corpus

    if options.builder == "documents":
        from mot_megatron.data.documents.build import build_documents

        if broken := build_documents(document_build(options)):
            say(
                NAME,
                f"{broken} broken documents left out; {options.output}/broken.jsonl lists them",
            )
        return Corpus.open(options.output)
    if options.builder == "megatron":
        from mot_megatron.data.documents.megatron import wrap_token_files

        wrap_token_files(
            {"train": options.train, "validation": options.validation},
            options.output,
            options.tokenizer,
            dict(special_names(options)),
        )
        return Corpus.open(options.output)
    shared = {"seed": options.seed, "workers": options.workers, "limit": options.limit}
    if options.builder == "stamps":
        from mot_megatron.data.builders.stamps import build_stamps

        build_stamps(options.deb, options.output, **shared)
    elif options.builder == "mixed":
        from mot_megatron.data.builders.mixed import DebPackages, build_mixed

        packages = DebPackages(options.stamps_deb, options.clipart_deb, options.wordnet_deb)
        build_mixed(packages, options.output, **shared)
    else:
        from mot_megatron.data.builders.openmoji import build_openmoji

        build_openmoji(options.output, **shared)
    return Corpus.open(options.output)


def counts(corpus: Corpus) -> dict[str, Any]:
    """Return the numbers of documents and tokens of every split, for JSON."""
    return {
        "splits": {
            name: {
                "documents": split.documents,
                "tokens": split.tokens,
                "tokens_per_modality": dict(split.tokens_per_modality),
                "context_tokens_per_modality": (
                    dict(split.context.tokens_per_modality) if split.context else {}
                ),
            }
            for name, split in corpus.description.splits.items()
        }
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``mot prepare``; return the exit status."""
    return run_command(NAME, __doc__, add_arguments, run, arguments)
