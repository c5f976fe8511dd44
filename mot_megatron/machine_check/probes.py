"""Probes of single operators that have been wrong, or have failed, on some devices.

Each compares with a plain computation of the same numbers, at the smallest size that shows it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from mot_megatron.machine_check.checks import Context
from mot_megatron.machine_check.outcome import Outcome

COMPILES_NOT = Outcome("SKIPPED", "torch.compile is switched off", "unset TORCH_COMPILE_DISABLE")
_POISONED_SIZES = [1 << power for power in range(4, 21)]


def poison_freed_memory(device: torch.device) -> None:
    """Fill freed blocks of all sizes with NaN, so that results that nothing writes are seen."""
    blocks = [torch.full((size,), float("nan"), device=device) for size in _POISONED_SIZES * 4]
    del blocks


def compiles() -> bool:
    """Return whether torch.compile compiles in this process."""
    return not torch._dynamo.config.disable


def zero_rows(context: Context) -> Outcome:
    """Run operators forward and backward on zero rows, as for a tower without tokens.

    Gradients of the weights must be zeros, and nothing may fail.
    """
    device = torch.device(context.device)
    problems = []
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.ones(64, device=device, dtype=dtype, requires_grad=True)
        matrix = torch.ones(48, 64, device=device, dtype=dtype, requires_grad=True)
        rows = torch.empty(0, 64, device=device, dtype=dtype, requires_grad=True)
        index = torch.empty(0, dtype=torch.int64, device=device)
        stream = torch.ones(8, 64, device=device, dtype=dtype, requires_grad=True)
        operations = {
            "rms_norm": lambda r=rows, w=weight: F.rms_norm(r, (64,), w, 1e-5),
            "linear": lambda r=rows, m=matrix: F.linear(r, m),
            "silu": lambda r=rows: F.silu(r) * r,
            "index_select": lambda s=stream, i=index: s.index_select(0, i),
            "index_add": lambda s=stream, i=index, r=rows: s.index_add(0, i, r),
            "index_put": lambda s=stream, i=index, r=rows: s.index_put((i,), r),
            "embedding": lambda m=matrix, i=index: F.embedding(i, m),
            "cat and split": lambda s=stream, r=rows: torch.cat([r, s]).split([0, 8])[0],
        }
        for name, operation in operations.items():
            problem = _zero_gradients(operation, (weight, matrix, rows, stream), device)
            if problem:
                problems.append(f"{name} in {_short(dtype)}: {problem}")
    if problems:
        return Outcome(
            "FAIL",
            "; ".join(problems),
            "towers without tokens train wrongly here: report it, and until then use batches in"
            ' which every modality occurs, such as data.packing = "budget"',
        )
    return Outcome("PASS", f"{len(operations)} operators, forward and backward, fp32 and bf16")


def _zero_gradients(
    operation: Callable[[], torch.Tensor], leaves: tuple[torch.Tensor, ...], device: torch.device
) -> str:
    """Return what is wrong with an operation on zero rows, or an empty string."""
    for leaf in leaves:
        leaf.grad = None
    poison_freed_memory(device)
    try:
        output = operation()
        output.backward(torch.ones_like(output))
        # index_add and index_put pass the gradient of the rows that they keep.
        kept = {id(leaves[-1])} if output.numel() else set()
        wrong = [
            leaf
            for leaf in leaves
            if leaf.grad is not None and id(leaf) not in kept and leaf.grad.count_nonzero()
        ]
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return f"{len(wrong)} gradients are not zero" if wrong else ""


def empty_groups(context: Context) -> Outcome:
    """Compare grouped_mm, some of whose groups are empty, with one product per group."""
    device = torch.device(context.device)
    counts = [0, 24, 0, 0, 40, 8, 0]
    ends = torch.tensor(counts, device=device).cumsum(0).to(torch.int32)
    problems, worst = [], 0.0
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(sum(counts), 64, generator=generator)
        stacked = torch.randn(len(counts), 64, 128, generator=generator) / 8
        upstream = torch.randn(sum(counts), 128, generator=generator)
        own = [t.to(device, dtype, copy=True).requires_grad_() for t in (rows, stacked)]
        poison_freed_memory(device)
        output = F.grouped_mm(own[0], own[1], offs=ends)
        output.backward(upstream.to(device, dtype))
        plain = [t.to(dtype).double().requires_grad_() for t in (rows, stacked)]
        parts = zip(plain[0].split(counts), plain[1], strict=True)
        wanted = torch.cat([part @ matrix for part, matrix in parts])
        wanted.backward(upstream.to(dtype).double())
        for name, got, expected in (
            ("output", output, wanted),
            ("gradient of rows", own[0].grad, plain[0].grad),
            ("gradient of weights", own[1].grad, plain[1].grad),
        ):
            error = relative_error(got, expected)
            worst = max(worst, error)
            if not error <= tolerance:
                problems.append(f"{name} in {_short(dtype)}: relative error {error:.1e}")
    if problems:
        return Outcome(
            "FAIL",
            "; ".join(problems),
            "experts without rows are wrong here: do not train with experts on this device and"
            " version of torch",
            {"relative_error": worst},
        )
    seen = f"output and gradients of 7 groups, 4 of them empty: relative error {worst:.1e}"
    return Outcome("PASS", seen, "", {"relative_error": worst})


def relative_error(got: torch.Tensor | None, wanted: torch.Tensor | None) -> float:
    """Return the norm of a difference over that of what is wanted; NaN if values are NaN."""
    assert got is not None
    assert wanted is not None
    difference = got.detach().double().cpu() - wanted.detach().double().cpu()
    return float(difference.norm() / wanted.detach().double().cpu().norm())


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def compilation(context: Context) -> Outcome:
    """Compile a function of a few operators with torch.compile and compare its results."""
    device = torch.device(context.device)

    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.silu(x) * y + torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)

    x, y = torch.randn(2, 32, 64, device=device)
    if not compiles():
        return COMPILES_NOT
    error = relative_error(torch.compile(function)(x, y), function(x, y))
    if not error <= 1e-5:
        return Outcome("FAIL", f"relative error {error:.1e}", "do not use torch.compile here")
    return Outcome("PASS", f"compiled and equal, relative error {error:.1e}")
