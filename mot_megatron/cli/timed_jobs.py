"""What the commands share that time training jobs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mot_megatron.cli.arguments import positive_int
from mot_megatron.cli.command import ON_CPU, choose_device
from mot_megatron.errors import DataError

if TYPE_CHECKING:
    from mot_megatron.config import Config


def add_timing(
    parser: argparse.ArgumentParser, *, steps: int, warmup: int, repeats: int, job: str
) -> None:
    """Add ``--steps``, ``--warmup``, ``--repeats`` and ``--synthetic``, with these defaults."""
    parser.add_argument(
        "--steps", type=positive_int, default=steps, help="per job (default %(default)s)"
    )
    parser.add_argument(
        "--warmup",
        type=positive_int,
        default=warmup,
        help="steps before those (default %(default)s)",
    )
    parser.add_argument(
        "--repeats", type=positive_int, default=repeats, help=f"{job} (default %(default)s)"
    )
    parser.add_argument(
        "--synthetic",
        action="store_true",
        help="train on one synthetic batch instead of the corpus, with the shares of --share",
    )


def job_environment() -> dict[str, str]:
    """Return the environment variables of the jobs, on GPUs if there are some."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    return environment | ON_CPU if choose_device().type == "cpu" else environment


def on_corpus(config: Config, synthetic: bool) -> Config:
    """Return the configuration with the absolute paths of its corpora.

    Raises:
        DataError: It has no corpus, and the jobs need one.
    """
    data = config.data
    for folder in data.folders:
        if not synthetic and not (folder / "corpus.toml").exists():
            raise DataError(
                f"{folder.resolve()}/corpus.toml: absent; give a corpus, or --synthetic"
            )
    sources = tuple(
        source.model_copy(update={"corpus": source.corpus.resolve()}) for source in data.sources
    )
    corpus = data.corpus and data.corpus.resolve()
    data = data.model_copy(update={"corpus": corpus, "sources": sources})
    return config.model_copy(update={"data": data})


def shares_text(config: Config, shares: Sequence[float]) -> str:
    """Return the shares of the tokens of modalities, as ``--synthetic`` of training takes them."""
    pairs = zip(config.model.modalities, shares, strict=True)
    return ",".join(f"{name}={share!r}" for name, share in pairs)
