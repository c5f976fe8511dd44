"""Probes pass on a CPU, and find the mistakes that they are for."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mot_megatron.machine_check import attention, probes, software, speed, worlds
from mot_megatron.machine_check.checks import Context


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context("cpu", 2, tmp_path, tmp_path, {})


def test_zero_rows(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    assert probes.zero_rows(context).status == "PASS"
    right = F.rms_norm

    def wrong(rows: torch.Tensor, shape: tuple[int], weight: torch.Tensor, eps: float) -> Any:
        return right(rows, shape, weight, eps) if len(rows) else rows * 0 + _unwritten(rows, weight)

    monkeypatch.setattr(F, "rms_norm", wrong)
    outcome = probes.zero_rows(context)
    assert outcome.status == "FAIL"
    assert "rms_norm in fp32: 1 gradients are not zero" in outcome.seen


class _Unwritten(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return rows.new_empty(0, len(weight))

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        del upstream
        (weight,) = ctx.saved_tensors
        return None, torch.full_like(weight, float("nan"))


def _unwritten(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return no rows; backward gives the weight a gradient of NaN."""
    result = _Unwritten.apply(rows, weight)
    assert isinstance(result, torch.Tensor)
    return result


def test_empty_groups(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    assert probes.empty_groups(context).status == "PASS"
    right = F.grouped_mm

    def wrong(rows: torch.Tensor, stacked: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
        output = right(rows, stacked, offs=offs)
        stacked.register_hook(lambda gradient: gradient + 1.0)
        return output

    monkeypatch.setattr(F, "grouped_mm", wrong)
    outcome = probes.empty_groups(context)
    assert outcome.status == "FAIL"
    assert "gradient of weights in fp32: relative error" in outcome.seen
    assert "output" not in outcome.seen


def test_what_needs_a_compiler_is_skipped_if_it_is_switched_off(context: Context) -> None:
    settings = {"head_dim": 16, "heads": 2, "groups": 1, "length": 64}
    for outcome in (probes.compilation(context), attention.attention(context, **settings)):
        assert outcome.status == "SKIPPED"
        assert outcome.advice == "unset TORCH_COMPILE_DISABLE"


def test_errors_of_attention_are_judged(context: Context) -> None:
    judge = attention._judge
    fine = judge(context, {"output": 1e-7}, torch.float32, 32)
    assert fine.status == "PASS"
    assert "forward only" in fine.seen
    for error in (1e-3, float("nan")):
        outcome = judge(context, {"output": error}, torch.float32, 32)
        assert outcome.status == "FAIL"
        assert outcome.advice.endswith('set model.attention_backend = "sdpa"')


def test_software_and_host(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = software.check_software(context)
    assert outcome.status == "PASS", outcome
    assert outcome.numbers["torch"] == torch.__version__
    host = software.check_host(context)
    assert host.status in ("PASS", "SLOW")  # the machine may be busy
    monkeypatch.setattr(software, "_compiler", lambda: None)
    assert software.check_host(context).status == "SLOW"
    monkeypatch.setattr(
        software,
        "_requirements",
        lambda: [software.Requirement("torch>=99"), software.Requirement("no-such-package")],
    )
    outcome = software.check_software(context)
    assert outcome.status == "FAIL"
    assert "is not >=99" in outcome.seen
    assert "no-such-package is missing" in outcome.seen


def test_world_of_one(context: Context) -> None:
    # A new process, because this one may have a world already.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        outcome = pool.submit(worlds.world_of_one, context, binds_device=True).result()
    assert outcome.status == "PASS"
    assert outcome.seen.startswith("all-reduce right")


@pytest.mark.slow
def test_links_and_layers(context: Context) -> None:
    outcome = worlds.links(context, world_size=2)
    assert outcome.status == "PASS"
    assert set(outcome.numbers["bytes_per_second"]) == {"all-reduce", "all-to-all"}
    small = {"tokens": 64, "hidden": 32, "heads": 2}
    assert speed.repeatability(context, **small).status == "PASS"
    outcome = speed.layer(context, tokens=64, hidden=32, heads=2, repeats=2)
    assert set(outcome.numbers["ratio_to_dense"]) == {"mot-2", "mot-3"}


def record(seconds: float) -> dict[str, Any]:
    return {
        "step_seconds": [9.0, 9.0, 9.0, *[seconds] * 8],
        "flops": [4e9] * 11,
        "positions": 1000,
        "peak_flops_per_second": 1e10,
        "peak_memory_bytes": 2e9,
    }


def test_figures_leave_out_the_warm_up() -> None:
    found = speed.figures(record(0.5))
    assert found["seconds"] == 0.5
    assert found["tokens_per_second"] == 2000
    assert found["mfu"] == pytest.approx(0.8)  # 4e9 / 0.5 / 1e10


@pytest.mark.parametrize(
    ("seconds", "advice", "status"),
    [(0.4, "set it", "SLOW"), (0.4, "", "PASS"), (0.49, "set it", "PASS"), (0.9, "x", "PASS")],
)
def test_a_switch_that_helps_is_named(
    context: Context,
    monkeypatch: pytest.MonkeyPatch,
    seconds: float,
    advice: str,
    status: str,
) -> None:
    seen = []

    def timed(context: Context, name: str, config: str, overrides: Any, world_size: int) -> Any:
        del config, world_size
        seen.append((name, tuple(overrides), context.environment.get("SWITCH")))
        return record(0.5 if name.startswith("step") else seconds)

    monkeypatch.setattr(speed, "_timed", timed)
    (context.directory / "logs").mkdir()
    outcome = speed.switch(
        context,
        config="x.toml",
        base=["a.b=1"],
        overrides=["c.d=2"],
        variables={"SWITCH": "on"},
        advice=advice,
    )
    assert seen == [
        ("step-x-b-1-1", ("a.b=1",), None),
        ("switch-x-d-2-on-1", ("a.b=1", "c.d=2"), "on"),
    ]
    assert outcome.status == status
    assert outcome.numbers["ratio"] == pytest.approx(seconds / 0.5)
