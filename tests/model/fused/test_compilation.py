"""All kernels compile for GPUs: Triton needs none for that, and its interpreter allows more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_kernels_compile_for_hopper(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "tests.model.fused.compile_kernels", "bfloat16", "90"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    launches = {tuple(line.split()[:2]) for line in done.stdout.splitlines()}
    kernels = [
        f"{name}.{way}"
        for name in ("swiglu", "residual_norm", "qkv")
        for way in ("_forward", "_backward")
    ]
    assert launches == {("sm_90", kernel) for kernel in [*kernels, "gather._forward"]}
