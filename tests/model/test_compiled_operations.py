"""Operations that torch.compile fuses equal plain PyTorch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.model.small_models import (
    assert_all_close,
    random_tokens,
    single_rank_model,
    small_config,
    take_gradients,
)

ROOT = Path(__file__).parents[2]
TOWERS = {"text": "all", "image": "all"}


def compare_backends() -> None:
    """Compare a model whose operations are compiled with plain PyTorch."""
    overrides = ("model.num_layers=1", "model.hidden_size=16", "model.num_attention_heads=2")
    plain, compiled = (
        small_config(TOWERS, *overrides, f"model.layer_backend={backend}")
        for backend in ("torch", "compile")
    )
    both = []
    for config in (plain, compiled):
        model = single_rank_model(config)
        batch = random_tokens(0, list(TOWERS), (1, 1), (1, 13)).micro_batch(config)
        loss, _ = model(batch)
        loss.backward()
        both.append({"loss": loss.detach(), **take_gradients(model)})
    assert_all_close(both[1], both[0], 1e-5)
    frames = torch._dynamo.utils.counters["frames"]
    assert frames["ok"] == frames["total"] > 0, frames


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_operations_equal_plain_pytorch(tmp_path: Path) -> None:
    environment = os.environ | {
        "TORCH_COMPILE_DISABLE": "0",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
    }
    command = "from tests.model.test_compiled_operations import compare_backends as f; f()"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
