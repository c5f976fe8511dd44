"""Show what a corpus contains: counts, fill, entropies, example documents, pictures and sound.

This also writes lengths.png (histograms of documents and segments), contact_sheet.png
(reconstructed pictures, with the originals above them if the corpus keeps these) and speech.wav
(speech units decoded to sound).

Example: mot inspect corpora/openmoji
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from mot_megatron.cli.arguments import add_json, add_output, positive_int, user_path
from mot_megatron.cli.command import print_json, run_command, say

NAME = "inspect"
MOST_SOURCES = 20
"""Source files that are listed at most."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command line."""
    parser.add_argument("corpus", type=user_path, metavar="CORPUS", help="folder of the corpus")
    add_output(parser, "folder for the files (default CORPUS/inspection)", required=False)
    parser.add_argument(
        "--seq-length",
        type=positive_int,
        help="sequence length for the fill (default 512, or the longest document)",
    )
    parser.add_argument(
        "--examples", type=positive_int, default=4, help="documents to show (default 4)"
    )
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Inspect the corpus and print the report."""
    say(NAME, f"reading {options.corpus}")

    from mot_megatron.data.corpus import Corpus
    from mot_megatron.data.inspection import inspect

    output = options.output or options.corpus / "inspection"
    corpus = Corpus.open(options.corpus)
    corpus.check_latents()
    report = inspect(corpus, output, options.seq_length, options.examples)
    if options.json:
        print_json(report)
    else:
        print_report(report)
    return 0


def print_report(report: dict[str, Any]) -> None:
    """Print the report as text, at most 120 columns wide except for example documents."""
    print(f"{report['name']} by {report['builder']}, seed {report['seed']}")
    for modality in report["modalities"]:
        first, last = modality["first_id"], modality["first_id"] + modality["size"] - 1
        print(f"  {modality['name']}: ids {first}..{last}, codec {modality['codec']}")
    print(
        f"\n{'split':<12}{'documents':>10}{'tokens':>12}{'longest':>9}{'fill':>8}  tokens of each"
    )
    for name, counts in report["splits"].items():
        each = ", ".join(f"{key} {value:,}" for key, value in counts["tokens_per_modality"].items())
        print(
            f"{name:<12}{counts['documents']:>10,}{counts['tokens']:>12,}"
            f"{counts['longest_document']:>9}{report['fill'][name]:>8.2%}  {each}"
        )
    for name, counts in report["splits"].items():
        if counts["context"]:
            tokens = counts["context"]["tokens_per_modality"]
            each = ", ".join(f"{key} {value:,}" for key, value in tokens.items())
            print(
                f"context only in {name}, never predicted: {sum(tokens.values()):,} tokens ({each})"
            )
    print(f"fill: packed into sequences of {report['seq_length']} tokens")
    print(
        "\nheld-out entropy in bits/token from counts on train, given 0, 1 and 2 tokens of context"
    )
    for modality in report["modalities"]:
        name = modality["name"]
        if name in report["entropies"]:
            _print_entropies(name, report["entropies"][name])
        else:
            print(f"  {name}: none, because it is not in both splits")
    _print_origin(report)
    print("\nheld-out documents:")
    for example in report["examples"]:
        print(f"  {example}")
    print()
    for key, value in report["files"].items():
        print(f"{key}: {value if isinstance(value, str) else format(value, '.2f')}")


def _print_origin(report: dict[str, Any]) -> None:
    licences = [f"{key}: {value}" for key, value in report["licences"].items()]
    print("\nlicenses: " + (", ".join(licences) or "none stated"))
    sources = report["sources"]
    for source in sources[:MOST_SOURCES]:
        broken = f", {source['broken']:,} broken" if source["broken"] else ""
        print(
            f"  {source['source']}: {source['documents']:,} documents ({source['held_out']:,} held "
            f"out), {source['tokens']:,} tokens{broken}"
        )
    if len(sources) > MOST_SOURCES:
        print(f"  and {len(sources) - MOST_SOURCES:,} more; --json lists all")


def _print_entropies(name: str, measured: dict[str, Any]) -> None:
    def line(label: str, entropies: dict[str, float]) -> str:
        bits = (entropies["unigram"], entropies["one_token"], entropies["two_tokens"])
        return f"  {label:<34}" + "".join(f"{value:>7.2f}" for value in bits)

    context = f"the tokens 1 and {measured['pair']} before"
    print(line(name, measured["all_tokens"]) + f"   two tokens: {context}")
    share = f"{measured['most_common_share']:.0%}"
    label = f"{name} without id {measured['most_common']} ({share})"
    print(line(label, measured["without_most_common"]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``mot inspect``; return the exit status."""
    return run_command(NAME, __doc__, add_arguments, run, arguments)
