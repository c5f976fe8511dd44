"""Time the data path: packing an epoch, and preparing one micro-batch.

``benchmark_data.py [--corpus DIR] [--step-seconds X] [--json]``. Without a corpus, documents are
synthetic: three modalities, median length 130, 95th percentile 200. Goals: at least 2 million
documents packed per second; preparing batches takes at most 2% of a training step. Also times
packing to budgets, of the same lengths cut into the modalities in drawn proportions.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from mot_megatron.data.budget import count_tower_tokens, pack_budget_epoch, tower_budgets
from mot_megatron.data.corpus import Corpus, Modality
from mot_megatron.data.loader import DataShard, GroupingPlan, PackedLoader
from mot_megatron.data.packing import Packing, pack_epoch
from mot_megatron.data.writer import CorpusWriter
from mot_megatron.errors import UserError
from mot_megatron.job.hardware import describe_machine

GOAL_DOCUMENTS_PER_SECOND = 2e6
GOAL_FRACTION_OF_STEP = 0.02
PACKED_DOCUMENTS = 1_000_000
CORPUS_DOCUMENTS = 5_000
BUDGET_DOCUMENTS = 100_000
BATCHES_PER_SAMPLE = 20
MODALITIES = (
    Modality(name="text", first_id=0, size=4096),
    Modality(name="image", first_id=4096, size=1024),
    Modality(name="speech", first_id=5120, size=500),
)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, help="also pack this corpus, and read it")
    parser.add_argument("--split", default="train", help="its split (default train)")
    parser.add_argument("--seq-length", type=_positive(int), default=512)
    parser.add_argument("--micro-batch-size", type=_positive(int), default=8)
    parser.add_argument(
        "--step-seconds", type=_positive(float), help="what a training step takes, to compare with"
    )
    parser.add_argument(
        "--micro-batches", type=_positive(int), default=1, help="per step (default 1)"
    )
    parser.add_argument("--repeats", type=_positive(int), default=15, help="samples (default 15)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    return parser.parse_args(arguments)


def _positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    def positive(text: str) -> float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text}, expected a number above 0")
        return value

    return positive


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest of the samples."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def scaled(values: dict[str, float], factor: float) -> dict[str, float]:
    """The same spread in another unit."""
    return {key: value * factor for key, value in values.items()}


def sample(work: Callable[[], object], repeats: int, description: str) -> list[float]:
    """Seconds of each call, after one that is not counted."""
    work()
    seconds = []
    for _ in tqdm(range(repeats), desc=description, delay=5, ncols=100, leave=False):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return seconds


def synthetic_lengths(count: int, longest: int) -> np.ndarray:
    """Lengths of ``count`` documents, [count] int64: log-normal, median 130, p95 200."""
    lengths = np.random.default_rng(0).lognormal(np.log(130), 0.26, count)
    return np.rint(lengths).astype(np.int64).clip(1, longest)


def write_synthetic_corpus(directory: Path, longest: int) -> None:
    """Documents with a segment of each modality in equal parts."""
    generator = np.random.default_rng(0)
    with CorpusWriter(
        directory=directory,
        name="synthetic",
        builder="benchmark_data 1",
        seed=0,
        modalities=MODALITIES,
        pad_token=0,
    ) as writer:
        for length in synthetic_lengths(CORPUS_DOCUMENTS, longest):
            bounds = np.linspace(0, length, len(MODALITIES) + 1).astype(int)
            parts = zip(MODALITIES, np.diff(bounds), strict=True)
            ids = [generator.integers(m.first_id, m.end_id, size) for m, size in parts]
            writer.add_document("train", np.concatenate(ids))


def benchmark_packing(
    lengths: np.ndarray, seq_length: int, repeats: int, name: str
) -> dict[str, Any]:
    """Time a whole epoch: shuffling the documents, packing them, shuffling the sequences."""
    seconds = sample(
        lambda: pack_epoch(lengths, seq_length, seed=0, epoch=0, source=name),
        repeats,
        f"packing {name}",
    )
    packing = pack_epoch(lengths, seq_length, seed=0, epoch=0)
    return {
        "documents": len(lengths),
        "seq_length": seq_length,
        "sequences": len(packing),
        "fill": float(lengths.sum() / (len(packing) * seq_length)),
        "documents_per_second": spread([len(lengths) / value for value in seconds]),
    }


def synthetic_counts(lengths: np.ndarray) -> np.ndarray:
    """Tokens per tower, [documents, 3] int32: every length cut in uniformly drawn proportions."""
    shares = np.random.default_rng(0).dirichlet(np.ones(len(MODALITIES)), len(lengths))
    counts = np.floor(shares * lengths[:, None]).astype(np.int32)
    counts[:, 0] += (lengths - counts.sum(axis=1)).astype(np.int32)
    return counts


def corpus_counts(corpus: Corpus, split: str) -> np.ndarray:
    """Tokens per tower, [documents, K] int32, where every modality has its own."""
    table = corpus.description.modality_of_id
    return count_tower_tokens(
        corpus.split(split), table, len(corpus.description.modalities), str(corpus.directory)
    )


def benchmark_budget(
    counts: np.ndarray, options: argparse.Namespace, repeats: int, name: str
) -> dict[str, Any]:
    """Time packing an epoch such that micro-batches have as many tokens of each tower."""
    sequences, capacity = options.micro_batch_size, options.seq_length
    budgets = tower_budgets(counts, sequences * capacity)

    def pack() -> Packing:
        return pack_budget_epoch(
            counts, budgets, sequences=sequences, capacity=capacity, seed=0, epoch=0, source=name
        )

    seconds = sample(pack, repeats, f"packing {name} to budgets")
    packing = pack()
    return {
        "documents": len(counts),
        "micro_batches": len(packing) // sequences,
        "budgets": list(budgets),
        "fill": float(counts.sum() / (len(packing) * capacity)),
        "documents_per_second": spread([len(counts) / value for value in seconds]),
    }


def benchmark_batches(corpus: Corpus, split: str, options: argparse.Namespace) -> dict[str, Any]:
    """Time reading, labeling and grouping micro-batches, one tower per modality."""
    towers = tuple(range(len(corpus.description.modalities)))
    loader = PackedLoader(
        corpus,
        split,
        seq_length=options.seq_length,
        micro_batch_size=options.micro_batch_size,
        grouping=GroupingPlan(towers, len(towers)),
        shard=DataShard(0, 1),
        seed=0,
    )

    def prepare() -> None:
        for _ in range(BATCHES_PER_SAMPLE):
            loader.next_micro_batch()

    samples = sample(prepare, options.repeats, "preparing batches")
    seconds = spread([value / BATCHES_PER_SAMPLE for value in samples])
    tokens = options.seq_length * options.micro_batch_size
    return {"corpus": corpus.description.name, "tokens": tokens, "seconds_per_micro_batch": seconds}


def benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """Everything, as the object that --json prints.

    Raises:
        DataError: The corpus cannot be used with this sequence length.
    """
    lengths = synthetic_lengths(PACKED_DOCUMENTS, options.seq_length)
    packing = {
        "synthetic": benchmark_packing(lengths, options.seq_length, options.repeats, "synthetic")
    }
    counts = synthetic_counts(lengths[:BUDGET_DOCUMENTS])
    budget = {"synthetic": benchmark_budget(counts, options, options.repeats, "synthetic")}
    if options.corpus is None:
        with tempfile.TemporaryDirectory() as directory:
            write_synthetic_corpus(Path(directory) / "corpus", options.seq_length)
            corpus = Corpus.open(Path(directory) / "corpus")
            batches = benchmark_batches(corpus, "train", options)
    else:
        corpus = Corpus.open(options.corpus)
        lengths = corpus.split(options.split).lengths
        source = str(options.corpus)
        packing["corpus"] = benchmark_packing(lengths, options.seq_length, options.repeats, source)
        counts = corpus_counts(corpus, options.split)
        budget["corpus"] = benchmark_budget(counts, options, options.repeats, source)
        batches = benchmark_batches(corpus, options.split, options)
    result = {
        "benchmark": "data",
        "machine": describe_machine(torch.device("cpu")),
        "packing": packing,
        "budget_packing": budget,
        "batch_preparation": batches,
        "ratio_to_goal": {
            name: scaled(values["documents_per_second"], 1 / GOAL_DOCUMENTS_PER_SECOND)
            for name, values in packing.items()
        },
    }
    if options.step_seconds is not None:
        per_step = options.micro_batches / options.step_seconds
        result["step_seconds"] = options.step_seconds
        result["ratio_to_step"] = scaled(batches["seconds_per_micro_batch"], per_step)
    return result


def show(result: dict[str, Any]) -> None:
    """Print what --json prints as a few lines for people."""
    for name, values in result["packing"].items():
        rate = scaled(values["documents_per_second"], 1e-6)
        print(
            f"packing, {name}: {rate['median']:.1f} million documents/s "
            f"({rate['low']:.1f}..{rate['high']:.1f}; goal "
            f"{GOAL_DOCUMENTS_PER_SECOND / 1e6:.0f}), {values['fill']:.2%} of the positions filled"
        )
    for name, values in result["budget_packing"].items():
        rate = scaled(values["documents_per_second"], 1e-6)
        print(
            f"packing to budgets, {name}: {rate['median']:.2f} million documents/s "
            f"({rate['low']:.2f}..{rate['high']:.2f}), {values['fill']:.2%} of the positions filled"
        )
    batches = result["batch_preparation"]
    milliseconds = scaled(batches["seconds_per_micro_batch"], 1e3)
    print(
        f"preparing {batches['tokens']} tokens of {batches['corpus']}: "
        f"{milliseconds['median']:.3f} ms ({milliseconds['low']:.3f}..{milliseconds['high']:.3f})"
    )
    if "ratio_to_step" in result:
        ratio = result["ratio_to_step"]
        print(
            f"of a step of {result['step_seconds']} s: {ratio['median']:.3%} "
            f"({ratio['low']:.3%}..{ratio['high']:.3%}; goal {GOAL_FRACTION_OF_STEP:.0%})"
        )
    print("machine: " + ", ".join(f"{key} {value}" for key, value in result["machine"].items()))


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    options = parse_arguments(arguments)
    try:
        result = benchmark(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(result))
    else:
        show(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
