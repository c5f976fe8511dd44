"""A run on tokens and vectors trains, saves, resumes with the same noise, and reports its units."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest
import torch

from mot_megatron.cli.summary import table
from mot_megatron.data.corpus import Corpus
from mot_megatron.run.loop import train
from mot_megatron.train.session import build_groups, resolve_config
from tests.ranks import run_ranks
from tests.small_runs import small_config
from tests.vector_corpus import FLOW, write_vector_corpus

pytestmark = pytest.mark.slow


def run(corpus_directory: Path, runs: Path) -> str:
    """Train; return what the run printed."""
    settings = [
        FLOW,
        "model.modalities.image.objective.condition_dropout=0.5",
        f"run.directory={runs}",
        "training.train_steps=6",
        "checkpoint.interval_steps=3",
        "evaluation.interval_steps=3",
        "logging.interval_steps=1",
    ]
    corpus = Corpus.open(corpus_directory)
    config = resolve_config(small_config(corpus_directory, settings), corpus)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        train(config, corpus, build_groups(config, corpus, torch.device("cpu")))
    return printed.getvalue()


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    corpus = write_vector_corpus(tmp_path / "corpus")
    summaries, printed = [], ""
    for _ in range(2):
        (printed,) = run_ranks(run, 1, corpus, tmp_path)
        summary = json.loads((tmp_path / "small" / "summary.json").read_text())
        summaries.append(summary)
        (tmp_path / "small" / "summary.json").unlink()
        shutil.rmtree(tmp_path / "small" / "checkpoints" / "step_00000006")
    first, second = (summary["modalities"] for summary in summaries)
    assert first == second
    assert first["image"]["unit"] == "squared error"
    assert 0 < first["image"]["held_out_loss"] < 3
    assert first["text"]["held_out_bits_per_token"] > 0
    units = "bits per token (text), squared error (image), bits per token (speech)"
    assert f"losses are in {units}" in printed
    assert "continuing from" in printed
    assert "no samples" in printed
    assert "squared error, held out" in table(summaries[0])
