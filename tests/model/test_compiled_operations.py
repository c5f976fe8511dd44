"""Operations that torch.compile fuses equal plain PyTorch, with varying numbers of rows.

The test captures and differentiates their graphs, but runs them without generating code, which
takes minutes on a CPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
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
TOWERS = {"text": "text", "image": "image"}


def compare_backends() -> None:
    """Compare models whose operations are compiled with plain PyTorch."""
    torch.compile = partial(torch.compile, backend="aot_eager")
    overrides = ("model.num_layers=1", "model.norm_placement=pre")
    plain, compiled = (
        single_rank_model(small_config(TOWERS, *overrides, f"model.layer_backend={backend}"))
        for backend in ("torch", "compile")
    )
    for mix in ((1, 1), (2, 1)):
        both = []
        for model in (plain, compiled):
            batch = random_tokens(0, list(TOWERS), mix, (1, 13)).micro_batch(small_config(TOWERS))
            loss, _ = model(batch)
            loss.backward()
            both.append({"loss": loss.detach(), **take_gradients(model)})
        assert_all_close(both[1], both[0], 1e-5)
    # Every call was captured, and in one piece.
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] >= 3
    assert not counters["graph_break"], counters["graph_break"]


@pytest.mark.slow
def test_compiled_operations_equal_plain_pytorch() -> None:
    command = "from tests.model.test_compiled_operations import compare_backends as f; f()"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", command],
        cwd=ROOT,
        env=os.environ | {"TORCH_COMPILE_DISABLE": "0"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
