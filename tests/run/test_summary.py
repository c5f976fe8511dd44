"""The layout and the losses in summary.json."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

from mot_megatron.config import Config
from mot_megatron.config_files import parse_config
from mot_megatron.data.corpus import Corpus
from mot_megatron.parallel.placement import Placement
from mot_megatron.run.summary import layout_record, write_summary
from mot_megatron.train.session import build_groups, build_session, resolve_config
from mot_megatron.train.state import Progress
from mot_megatron.train.step import HeldOut
from tests.ranks import run_ranks
from tests.small_runs import CONFIG, small_config, write_corpus


def config_of(*overrides: str) -> Config:
    settings = ["model.vocab_size=256", *(f"parallel.{override}" for override in overrides)]
    return parse_config(CONFIG.format(corpus="none"), "small.toml", settings)


def test_layout_record_of_one_rank() -> None:
    assert layout_record(config_of("zero_stage=2"), None) == {
        "tensor_model_parallel_size": 1,
        "sequence_parallel": False,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "modality_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "placement": None,
        "attention_exchange": None,
        "zero_stage": 2,
    }


def test_layout_record_with_every_axis() -> None:
    config = config_of(
        "tensor_model_parallel_size=2",
        "sequence_parallel=true",
        "pipeline_model_parallel_size=2",
        "modality_parallel_size=2",
        "attention_exchange=heads",
    )
    found = layout_record(config, Placement(((1.0, 0.5, 0.0), (0.0, 0.5, 1.0))))
    assert found == {
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": None,
        "modality_parallel_size": 2,
        "expert_model_parallel_size": 1,
        "placement": [{"text": 1.0, "image": 0.5}, {"image": 0.5, "speech": 1.0}],
        "attention_exchange": "heads",
        "zero_stage": 1,
    }


def write(corpus_directory: Path, runs: Path) -> None:
    """Write the summary of a run that has not begun, on the first of two ranks."""
    config = small_config(
        corpus_directory, [f"run.directory={runs}", "parallel.modality_parallel_size=2"]
    )
    corpus = Corpus.open(corpus_directory)
    config = resolve_config(config, corpus)
    session = build_session(config, corpus, build_groups(config, corpus, torch.device("cpu")))
    if session.is_first_rank:
        config.run_directory.mkdir()
        write_summary(session, Progress(), HeldOut((1.0, 2.0, math.nan), (1.5, 2.5, math.nan)), 3)


def test_summary_records_placement_and_losses(tmp_path: Path) -> None:
    run_ranks(write, 2, write_corpus(tmp_path / "corpus"), tmp_path)
    summary = json.loads((tmp_path / "small" / "summary.json").read_text())
    assert summary["modality_parallel_size"] == 2
    # Three towers of similar size on two ranks.
    assert sorted(map(len, summary["placement"])) == [1, 2]
    image, speech = (summary["modalities"][name] for name in ("image", "speech"))
    assert (image["held_out_bits_per_token"], image["held_out_bits_per_token_causal"]) == (2.0, 2.5)
    assert speech["held_out_bits_per_token_causal"] is None
