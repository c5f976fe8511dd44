"""What tells runs in different layouts apart."""

from __future__ import annotations

from mot_megatron.config import Config, parse_config
from mot_megatron.parallel.placement import Placement
from mot_megatron.train.placing import place_towers
from mot_megatron.train.summary import layout

from .small_runs import CONFIG


def config_of(*overrides: str) -> Config:
    settings = ["model.vocab_size=256", *(f"parallel.{override}" for override in overrides)]
    return parse_config(CONFIG.format(corpus="none"), "small.toml", settings)


def test_one_rank() -> None:
    assert layout(config_of("zero_stage=2"), None) == {
        "tensor_model_parallel_size": 1,
        "sequence_parallel": False,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "modality_parallel_size": 1,
        "placement": None,
        "attention_exchange": None,
        "zero_stage": 2,
    }


def test_every_axis() -> None:
    config = config_of(
        "tensor_model_parallel_size=2",
        "sequence_parallel=true",
        "pipeline_model_parallel_size=2",
        "modality_parallel_size=2",
        "attention_exchange=heads",
    )
    found = layout(config, Placement(((1.0, 0.5, 0.0), (0.0, 0.5, 1.0))))
    assert found == {
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": None,
        "modality_parallel_size": 2,
        "placement": [{"text": 1.0, "image": 0.5}, {"image": 0.5, "speech": 1.0}],
        "attention_exchange": "heads",
        "zero_stage": 1,
    }


def test_placements_chosen_for_a_corpus_are_told_apart() -> None:
    config = config_of("modality_parallel_size=2")
    chosen = [layout(config, place_towers(config, tokens)) for tokens in ((5, 3, 2), (2, 3, 5))]
    assert chosen[0]["placement"] != chosen[1]["placement"]
