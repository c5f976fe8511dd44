"""Time how fast text, pictures and sound become ids, on one core, beside the codec alone.

Sources are synthetic: texts of 200 words, PNG pictures of 256 x 256 pixels, and WAV files of 2 s.
Codebooks are the built-in ones. The whole way is what mot prepare documents does in each worker:
read, decode, resize or resample, encode.

Example: mot benchmark documents --documents 1000
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from mot_megatron.cli.arguments import add_json, positive_int
from mot_megatron.cli.command import print_json, run_command, say

NAME = "benchmark documents"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command line."""
    parser.add_argument(
        "--documents",
        type=positive_int,
        default=400,
        metavar="N",
        help="of each kind (default 400)",
    )
    parser.add_argument("--repeats", type=positive_int, default=5, help="samples (default 5)")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Run the benchmark and print the result."""
    say(NAME, f"making {options.documents} documents of each kind")

    from mot_megatron.benchmark.documents import DocumentsSettings, benchmark

    result = benchmark(DocumentsSettings(options.documents, options.repeats))
    if options.json:
        print_json(result)
        return 0
    print(f"{'one core':<10}{'documents/s':>26}{'MB/s':>22}{'codec alone':>26}{'its share':>20}")
    for kind, rates in result["kinds"].items():
        print(
            f"{kind:<10}{_text(rates['documents_per_second'], ',.0f'):>26}"
            f"{_text(rates['megabytes_per_second'], '.2f'):>22}"
            f"{_text(rates['codec_documents_per_second'], ',.0f'):>26}"
            f"{_text(rates['share_of_codec'], '.0%'):>20}"
        )
    print("median (lowest..highest); MB of source files")
    print("machine: " + ", ".join(f"{key} {value}" for key, value in result["machine"].items()))
    return 0


def _text(spread: dict[str, Any], form: str) -> str:
    return (
        f"{format(spread['median'], form)} "
        f"({format(spread['low'], form)}..{format(spread['high'], form)})"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``mot benchmark documents``; return the exit status."""
    return run_command(NAME, __doc__, add_arguments, run, arguments)
