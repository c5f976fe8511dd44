"""Time the data path: packing an epoch of documents, and preparing one micro-batch."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass(frozen=True)
class DataPathSettings:
    """What to time."""

    corpus: Path | None
    """A corpus to pack and read besides the synthetic documents."""
    split: str
    """The corpus's split."""
    seq_length: int
    micro_batch_size: int
    """Sequences per micro-batch."""
    micro_batches: int
    """Micro-batches per training step."""
    step_seconds: float | None
    """Duration of a training step, to compare with."""
    repeats: int
    """Samples of each time."""


def spread(values: list[float]) -> dict[str, float]:
    """Return median, smallest and largest of the samples."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def scaled(values: dict[str, float], factor: float) -> dict[str, float]:
    """Return the same spread in another unit."""
    return {key: value * factor for key, value in values.items()}


def sample(work: Callable[[], object], repeats: int, description: str) -> list[float]:
    """Return the seconds of each call, after one untimed warm-up call."""
    work()
    seconds = []
    for _ in tqdm(range(repeats), desc=description, delay=5, ncols=100, leave=False):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return seconds


def synthetic_lengths(count: int, longest: int) -> np.ndarray:
    """Return the lengths of ``count`` documents, [count] int64: log-normal, median 130, p95 200."""
    lengths = np.random.default_rng(0).lognormal(np.log(130), 0.26, count)
    return np.rint(lengths).astype(np.int64).clip(1, longest)


def write_synthetic_corpus(directory: Path, longest: int) -> None:
    """Write documents with one segment of each modality, equally long."""
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
    """Time packing an epoch: shuffle the documents, pack them, shuffle the sequences."""
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
    """Return tokens per tower, [documents, 3] int32: lengths split in random proportions."""
    shares = np.random.default_rng(0).dirichlet(np.ones(len(MODALITIES)), len(lengths))
    counts = np.floor(shares * lengths[:, None]).astype(np.int32)
    counts[:, 0] += (lengths - counts.sum(axis=1)).astype(np.int32)
    return counts


def corpus_counts(corpus: Corpus, split: str) -> np.ndarray:
    """Return tokens per tower, [documents, K] int32, with a tower per modality."""
    table = corpus.description.modality_of_id
    return count_tower_tokens(
        corpus.split(split), table, len(corpus.description.modalities), str(corpus.directory)
    )


def benchmark_budget(
    counts: np.ndarray, settings: DataPathSettings, repeats: int, name: str
) -> dict[str, Any]:
    """Time packing an epoch so that every micro-batch has the same tokens per tower."""
    sequences, capacity = settings.micro_batch_size, settings.seq_length
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


def benchmark_batches(corpus: Corpus, split: str, settings: DataPathSettings) -> dict[str, Any]:
    """Time reading, labeling and grouping micro-batches, with a tower per modality."""
    towers = tuple(range(len(corpus.description.modalities)))
    loader = PackedLoader(
        corpus,
        split,
        seq_length=settings.seq_length,
        micro_batch_size=settings.micro_batch_size,
        grouping=GroupingPlan(towers, len(towers)),
        shard=DataShard(0, 1),
        seed=0,
    )

    def prepare() -> None:
        for _ in range(BATCHES_PER_SAMPLE):
            loader.next_micro_batch()

    samples = sample(prepare, settings.repeats, "preparing batches")
    seconds = spread([value / BATCHES_PER_SAMPLE for value in samples])
    tokens = settings.seq_length * settings.micro_batch_size
    return {"corpus": corpus.description.name, "tokens": tokens, "seconds_per_micro_batch": seconds}


def benchmark(settings: DataPathSettings) -> dict[str, Any]:
    """Run all measurements; return the results, ready for JSON.

    Raises:
        DataError: The corpus cannot be used with this sequence length.
    """
    lengths = synthetic_lengths(PACKED_DOCUMENTS, settings.seq_length)
    packing = {
        "synthetic": benchmark_packing(lengths, settings.seq_length, settings.repeats, "synthetic")
    }
    counts = synthetic_counts(lengths[:BUDGET_DOCUMENTS])
    budget = {"synthetic": benchmark_budget(counts, settings, settings.repeats, "synthetic")}
    if settings.corpus is None:
        with tempfile.TemporaryDirectory() as directory:
            write_synthetic_corpus(Path(directory) / "corpus", settings.seq_length)
            corpus = Corpus.open(Path(directory) / "corpus")
            batches = benchmark_batches(corpus, "train", settings)
    else:
        corpus = Corpus.open(settings.corpus)
        lengths = corpus.split(settings.split).lengths
        source = str(settings.corpus)
        packing["corpus"] = benchmark_packing(
            lengths, settings.seq_length, settings.repeats, source
        )
        counts = corpus_counts(corpus, settings.split)
        budget["corpus"] = benchmark_budget(counts, settings, settings.repeats, source)
        batches = benchmark_batches(corpus, settings.split, settings)
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
    if settings.step_seconds is not None:
        per_step = settings.micro_batches / settings.step_seconds
        result["step_seconds"] = settings.step_seconds
        result["ratio_to_step"] = scaled(batches["seconds_per_micro_batch"], per_step)
    return result
