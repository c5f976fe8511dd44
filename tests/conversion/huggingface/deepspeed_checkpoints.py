"""Checkpoints that DeepSpeed writes on two ranks, for the tests to read."""

from __future__ import annotations

import argparse
import contextlib
import io
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config

SHAPES: dict[str, Any] = {
    "vocab_size": 385,
    "hidden_size": 36,
    "intermediate_size": 47,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 6,
    "initializer_range": 0.3,
    "max_position_embeddings": 160,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "zero1": Qwen3Config(**SHAPES),
    "zero3": LlamaConfig(**SHAPES, tie_word_embeddings=True),
}
FROZEN = "model.layers.1.input_layernorm.weight"
FROZEN_VALUE = 1.5
STEP = "global_step1"


class _Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


def write_checkpoints(folder: Path) -> None:
    """Train a step with ZeRO-1 and ZeRO-3 in bf16, save, and let DeepSpeed convert both.

    ``folder/NAME.pt`` receives the fp32 weights, as DeepSpeed's own script puts them together. The
    model of ZeRO-3 is wrapped, and that of ZeRO-1 has a frozen parameter.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled
    deepspeed.init_distributed("gloo")
    for name, config in CONFIGS.items():
        _train(deepspeed, folder / name, config, int(name[-1]))
        dist.barrier()
        if dist.get_rank() == 0:
            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                _convert(folder, name)


def _train(deepspeed: Any, folder: Path, config: PretrainedConfig, stage: int) -> None:
    torch.manual_seed(stage)
    model = AutoModelForCausalLM.from_config(config)
    if stage == 1:
        model.get_parameter(FROZEN).requires_grad_(False).fill_(FROZEN_VALUE)
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [{"params": [p for p in trained if (p.ndim > 1) == matrix]} for matrix in (1, 0)]
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "overlap_comm": False, "sub_group_size": 5000},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": True},
    }
    wrapped = _Wrapper(model) if stage == 3 else model
    engine, *_ = deepspeed.initialize(
        model=wrapped, optimizer=torch.optim.AdamW(decayed, lr=0.05), config=settings
    )
    ids = torch.arange(32).view(1, -1) * (3 + dist.get_rank())
    loss = model(input_ids=ids, labels=ids).loss
    engine.backward(loss)
    engine.step()
    engine.save_checkpoint(str(folder), client_state={"seen": 32, "rates": [0.1, 0.2]})
    config.save_pretrained(folder)


def _convert(folder: Path, name: str) -> None:
    from deepspeed.checkpoint.ds_to_universal import main
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    weights: Any = get_fp32_state_dict_from_zero_checkpoint(str(folder / name))
    torch.save(
        {n.removeprefix("inner."): w.clone() for n, w in weights.items()}, folder / f"{name}.pt"
    )
    main(
        argparse.Namespace(
            input_folder=str(folder / name / STEP),
            output_folder=str(folder / name / "universal"),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )
