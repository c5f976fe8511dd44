"""Estimates of layouts are close to forecasts, which rehearse every one of them."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from mot_megatron.cli.command import QUIETLY_ON_CPU
from mot_megatron.cli.configs import config_directory
from mot_megatron.cli.scaling_rehearse import rehearse_all
from mot_megatron.planning.layouts import RECOMPUTE, plan
from mot_megatron.scaling.costs import Constants
from mot_megatron.scaling.estimate import base_configs, base_of, estimate
from mot_megatron.scaling.forecast import forecast
from mot_megatron.scaling.machine import load_machine
from tests.model.small_models import small_config

TOWERS = {"text": "text", "image": "image"}
SIZE = 16
LARGER = [
    *("model.hidden_size=1024", "model.num_attention_heads=16", "model.num_layers=8"),
    *("model.vocab_size=16384", "model.ffn_hidden_size=2816", "training.precision=bf16"),
    *("data.seq_length=4096", "training.global_batch_size=64", "training.micro_batch_size=2"),
]
TP2 = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
PP2 = "parallel.pipeline_model_parallel_size=2"
MP2 = "parallel.modality_parallel_size=2"
LAYOUTS = {
    "zero 2": ["parallel.zero_stage=2"],
    "zero 3": ["parallel.zero_stage=3"],
    "tensor": [*TP2, "training.recompute=selective"],
    "modality": [MP2, "parallel.attention_exchange=heads", "training.recompute=full"],
    "pipeline": [PP2, "parallel.virtual_pipeline_model_parallel_size=2"],
}


@pytest.mark.slow
def test_estimates_are_close_to_forecasts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in QUIETLY_ON_CPU.items():
        monkeypatch.setitem(os.environ, name, value)
    machine = load_machine(config_directory() / "machines" / "a100-80gb-efa.toml")
    constants, shares = Constants(), [0.5, 0.5]
    configs = {name: small_config(TOWERS, *LARGER, *keys) for name, keys in LAYOUTS.items()}
    worlds = {key: (config, 1) for key, config in base_configs(configs["zero 2"]).items()}
    base = {key: roles[0].ledger for key, roles in rehearse_all(worlds, shares).items()}
    bases = {mode: base_of(base[mode, 1], base[mode, 2]) for mode in RECOMPUTE}
    exact = rehearse_all({name: (config, SIZE) for name, config in configs.items()}, shares)
    for name, config in configs.items():
        mode = config.training.recompute
        layout = plan(config, SIZE, [1, 1])
        found = estimate(layout, mode, bases[mode], [1, 1], machine, constants)
        wanted = forecast(config, SIZE, exact[name], machine, constants)
        # The largest seen was 2%; a tenth is what users are told.
        assert found.seconds == pytest.approx(wanted.seconds, rel=0.05), name
        # Without latency, only bytes and FLOPs count.
        faster = replace(constants, latency_us=0.0)
        found = estimate(layout, mode, bases[mode], [1, 1], machine, faster)
        wanted = forecast(config, SIZE, exact[name], machine, faster)
        assert found.seconds == pytest.approx(wanted.seconds, rel=0.05), name
