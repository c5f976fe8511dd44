"""Training on a blend of corpora: what is logged, resuming, and changes of the sources."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mot_megatron.compare.curves import read_description
from mot_megatron.data import blend_stream
from mot_megatron.data.blend import open_training_data
from mot_megatron.errors import UserError
from mot_megatron.run import loop
from mot_megatron.run.console import Console
from mot_megatron.train.label_kinds import held_out_by_kind
from mot_megatron.train.preflight import check_documents
from mot_megatron.train.session import build_groups, resolve_config
from mot_megatron.train.step import StepResult
from mot_megatron.train.trained import load_trained_model
from tests.ranks import run_ranks
from tests.small_runs import small_config, write_corpus

pytestmark = pytest.mark.slow

COMMON = [
    "evaluation.interval_steps=4", "checkpoint.interval_steps=4", "logging.interval_steps=2",
    "training.global_batch_size=4", "optimizer.lr_decay_steps=20",
]  # fmt: skip


@dataclass(frozen=True)
class Job:
    """What a job did."""

    losses: list[tuple[float, ...]]
    lines: list[str]
    """What it printed."""
    error: str | None


def run_blend(sources: dict[Path, float], runs: Path, steps: int, overrides: list[str]) -> Job:
    """Train on a blend; a single source with weight 0 is the corpus itself."""
    blend_stream.WINDOW_DOCUMENTS = 40  # type: ignore[misc]
    blend_stream._BINS = 1
    tables = ", ".join(
        f'{{corpus = "{folder}", weight = {weight}}}' for folder, weight in sources.items()
    )
    data = ["-data.corpus", f"data.sources=[{tables}]", "evaluation.per_source=true"]
    given = [
        *COMMON, *(data if all(sources.values()) else []), f"run.directory={runs}",
        f"training.train_steps={steps}", *overrides,
    ]  # fmt: skip
    config = small_config(next(iter(sources)), given)
    results: list[StepResult] = []
    lines: list[str] = []
    train_step, say = loop.train_step, Console.say

    def recorded_step(*arguments: object, **options: object) -> StepResult:
        results.append(train_step(*arguments, **options))  # type: ignore[arg-type]
        return results[-1]

    def recorded_line(self: Console, line: str) -> None:
        lines.append(line)
        say(self, line)

    loop.train_step, Console.say = recorded_step, recorded_line
    error = None
    try:
        corpus = open_training_data(config.data)
        config = resolve_config(config, corpus)
        check_documents(config, corpus)
        loop.train(config, corpus, build_groups(config, corpus, torch.device("cpu")))
    except UserError as problem:
        error = str(problem)
    return Job([result.modality_losses for result in results], lines, error)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("corpora")
    return {
        name: write_corpus(root / name, seed=seed, without=without)
        for name, seed, without in (
            ("web", 1, None), ("books", 2, "speech"), ("talks", 3, "image")
        )
    }  # fmt: skip


@pytest.mark.parametrize(
    "layout",
    [
        [],
        ['data.packing="budget"', "training.micro_batch_size=2"],
        ["data.prefetch=true"],
        ["parallel.modality_parallel_size=2"],
    ],
    ids=["sequence", "budget", "prefetch", "modality-parallel"],
)
def test_resumes_bit_for_bit(folders: dict[str, Path], tmp_path: Path, layout: list[str]) -> None:
    sources = {folders["web"]: 0.5, folders["books"]: 0.3, folders["talks"]: 0.2}
    whole = run_ranks(run_blend, 2, sources, tmp_path / "whole", 8, layout)[0]
    first, rest = (
        run_ranks(run_blend, 2, sources, tmp_path / "halves", steps, layout)[0] for steps in (4, 8)
    )
    assert whole.error is first.error is rest.error is None
    assert str([*first.losses, *rest.losses]) == str(whole.losses)
    assert len(whole.losses) == 8
    summaries = [
        json.loads((tmp_path / run / "small/summary.json").read_text())
        for run in ("whole", "halves")
    ]
    for key in ("sources", "modalities", "tokens"):
        assert summaries[0][key] == summaries[1][key]


def test_resumes_with_other_numbers_of_ranks(folders: dict[str, Path], tmp_path: Path) -> None:
    sources = {folders["web"]: 2.0, folders["books"]: 1.0}
    whole = run_ranks(run_blend, 1, sources, tmp_path / "whole", 8, [])[0]
    first = run_ranks(run_blend, 2, sources, tmp_path / "parts", 4, [])[0]
    tensor_parallel = ["parallel.tensor_model_parallel_size=2"]
    rest = run_ranks(run_blend, 4, sources, tmp_path / "parts", 8, tensor_parallel)[0]
    found = np.array([*first.losses, *rest.losses])
    np.testing.assert_allclose(found, np.array(whole.losses), rtol=1e-5)


def test_what_is_logged(folders: dict[str, Path], tmp_path: Path) -> None:
    sources = {folders["web"]: 0.75, folders["books"]: 0.25}
    (job,) = run_ranks(run_blend, 1, sources, tmp_path, 8, [])
    assert job.error is None
    assert "shares of the tokens: web 75.0%, books 25.0%" in job.lines
    read = [line for line in job.lines if line.startswith("  read: web ")]
    assert len(read) == 4
    part = r"\d\d\.\d% of the tokens \([\d.k]+\), epoch \d\.\d\d"
    assert re.fullmatch(f"  read: web {part}; books {part}", read[-1])
    summary = json.loads((tmp_path / "small" / "summary.json").read_text())
    assert summary["corpus"] == "web + books"
    web, books = summary["sources"]["web"], summary["sources"]["books"]
    assert web["tokens"] + books["tokens"] == summary["tokens"]
    assert web["epochs"] > 0
    # The held-out loss of all is between those of the sources; there is no speech in books.
    assert books["held_out_loss"]["speech"] is None
    for name in ("text", "image"):
        both = sorted(each["held_out_loss"][name] for each in (web, books))
        assert both[0] <= summary["modalities"][name]["held_out_bits_per_token"] <= both[1]
    events = EventAccumulator(str(tmp_path / "small" / "tensorboard"), {"scalars": 0}).Reload()

    def points(tag: str) -> dict[int, float]:
        return {point.step: point.value for point in events.Scalars(tag)}

    assert points("sources/tokens/web")[8] == web["tokens"]
    assert points("sources/epochs/books")[8] == pytest.approx(books["epochs"], abs=1e-4)
    assert points("sources/loss_held_out/web/text")[8] == pytest.approx(
        web["held_out_bits_per_token"]["text"], abs=1e-4
    )
    assert points("sources/loss_total/books").keys() == {4, 8}
    description = read_description(tmp_path / "small" / "corpus.toml")
    assert description.name == "web + books"


def test_sources_and_weights_may_change(folders: dict[str, Path], tmp_path: Path) -> None:
    web, books, talks = folders["web"], folders["books"], folders["talks"]
    changes: list[tuple[dict[Path, float], list[str]]] = [
        ({web: 0}, []),
        (
            {web: 3, books: 1},
            [
                "  source web: 75.0% of the tokens, 100.0% before",
                "  source books: 25.0% of the tokens, new",
            ],
        ),
        ({web: 1, books: 1}, ["  source web: 50.0% of the tokens, 75.0% before"]),
        (
            {books: 1, talks: 1},
            [
                "  source talks: 50.0% of the tokens, new",
                "  source web: left out, after ",
            ],
        ),
        ({talks: 0}, ["  source books: left out, after "]),
    ]
    for number, (sources, lines) in enumerate(changes, start=1):
        (job,) = run_ranks(run_blend, 1, sources, tmp_path, 2 * number, [])
        assert job.error is None
        assert len(job.losses) == 2
        for line in lines:
            assert any(printed.startswith(line) for printed in job.lines), job.lines
    (job,) = run_ranks(run_blend, 1, {web: 1.0, books: 1.0}, tmp_path, 12, [])
    assert job.error is not None
    assert "at least one must stay" in job.error


def test_a_trained_model_finds_its_blend(folders: dict[str, Path], tmp_path: Path) -> None:
    sources = {folders["web"]: 1.0, folders["books"]: 1.0}
    (job,) = run_ranks(run_blend, 1, sources, tmp_path, 2, [])
    assert job.error is None
    trained = load_trained_model(tmp_path / "small", torch.device("cpu"))
    assert trained.corpus.description.name == "web + books"
    losses = held_out_by_kind(trained)
    summary = json.loads((tmp_path / "small" / "summary.json").read_text())
    text = [loss for loss in losses if loss.modality == "text"]
    labels = sum(loss.labels for loss in text)
    mean = sum(loss.bits * loss.labels for loss in text if loss.labels) / labels
    assert mean == pytest.approx(summary["modalities"]["text"]["held_out_bits_per_token"], abs=1e-3)
    # The same vocabulary: one of the sources does as well.
    one = load_trained_model(tmp_path / "small", torch.device("cpu"), folders["books"])
    assert one.corpus.description.name == "small"


def test_long_documents_are_split_in_training_and_evaluation(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    # Documents of two modalities have up to 38 tokens, of three up to 57.
    sources, short = {folders["web"]: 1.0, folders["books"]: 1.0}, ["data.seq_length=26"]
    (job,) = run_ranks(run_blend, 1, sources, tmp_path / "refused", 2, short)
    assert job.error is not None
    assert '1..26 (seq_length); data.long_documents can be "split" or "truncate"' in job.error
    for long_documents, words in (("split", ", split into"), ("truncate", ", truncated: ")):
        settings = [*short, f"data.long_documents={long_documents}"]
        runs = tmp_path / long_documents
        (whole,) = run_ranks(run_blend, 1, sources, runs / "whole", 8, settings)
        (first,) = run_ranks(run_blend, 2, sources, runs / "parts", 4, settings)[:1]
        (rest,) = run_ranks(run_blend, 1, sources, runs / "parts", 8, settings)
        assert whole.error is first.error is rest.error is None
        lines = [line for line in first.lines if words in line]
        for line, split in zip(lines, ["train"] * 2 + ["validation"] * 2, strict=True):
            assert f": split {split}: " in line
        found = np.array([*first.losses, *rest.losses])
        np.testing.assert_allclose(found, np.array(whole.losses), rtol=1e-5)
