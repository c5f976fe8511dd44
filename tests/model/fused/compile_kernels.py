"""Compile every launch of the fused operations for GPUs, without a GPU; run by a test.

python -m tests.model.fused.compile_kernels bfloat16 80 90 100
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mot_megatron.model.fused import gather, qkv, residual_norm, swiglu
from mot_megatron.model.grouping import Grouping
from mot_megatron.model.heads import HeadNorms, ProjectedHeads
from mot_megatron.model.rotary import RotaryAngles

TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64"}
WARP_SIZE = 32


class Compiled:
    """Stands for a kernel; a launch compiles it for the arguments instead of running it."""

    def __init__(self, kernel: Any, architectures: list[int]) -> None:
        self.kernel = kernel
        self.architectures = architectures

    def __getitem__(self, grid: tuple[int, ...]) -> Compiled:
        assert min(grid) > 0, "an empty grid"
        return self

    def __call__(self, *arguments: Any, num_warps: int, **constants: int) -> None:
        values = dict(zip(self.kernel.arg_names, arguments, strict=False))
        assert [*values, *constants] == self.kernel.arg_names
        types = {
            name: TYPES[v.dtype] if isinstance(v, torch.Tensor) else _scalar(v)
            for name, v in values.items()
        }
        source = ASTSource(
            fn=self.kernel,
            signature=types | dict.fromkeys(constants, "constexpr"),
            constexprs=constants,
            attrs={
                (place,): [["tt.divisibility", 16]]
                for place, value in enumerate(values.values())
                if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)
            },
        )
        for architecture in self.architectures:
            target = GPUTarget("cuda", architecture, WARP_SIZE)
            binary = triton.compile(source, target=target, options={"num_warps": num_warps})
            assert binary.asm["cubin"]
            name = f"{self.kernel.__module__.rpartition('.')[2]}.{self.kernel.__name__}"
            print(f"sm_{architecture} {name} {types}")  # noqa: T201


def _scalar(value: float) -> str:
    return "fp32" if isinstance(value, float) else "i32"


def replace_kernels(modules: list[ModuleType], architectures: list[int]) -> None:
    """Replace the kernels of ``modules``, so that launches compile them."""
    for module in modules:
        for name in ("_forward", "_backward"):
            kernel = getattr(module, name, None)
            if isinstance(kernel, triton.JITFunction):
                setattr(module, name, Compiled(kernel, architectures))


def run_operations(dtype: torch.dtype) -> None:
    """Launch every kernel once, with sizes of a small model on a GPU."""

    def rows(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, requires_grad=True)

    swiglu.swiglu(rows(8, 2 * 1408)).sum().backward()
    residual_norm.norm_then_add(rows(8, 1024), rows(8, 1024), rows(1024), 1e-5).sum().backward()
    total, normed = residual_norm.add_then_norm(rows(8, 768), rows(8, 768), rows(768), 1e-5)
    (total + normed).sum().backward()
    grouping = Grouping((torch.tensor([1, 2, 4]), torch.tensor([0, 3])), (4, 2))
    angles = RotaryAngles.of(torch.arange(5), 128, 1e4, dtype)
    heads = ProjectedHeads(4, 2, 128)
    for norms in (None, HeadNorms((rows(128),) * 2, (rows(128),) * 2, 1e-5)):
        projections = [rows(4, 2048), rows(2, 2048)]
        q, k, v = qkv.rotated_heads(projections, heads, norms, grouping, angles)
        (q.sum() + k.sum() + v.sum()).backward()
    gather.gathered(grouping, rows(5, 1024))


if __name__ == "__main__":
    replace_kernels([gather, qkv, residual_norm, swiglu], [int(word) for word in sys.argv[2:]])
    run_operations(getattr(torch, sys.argv[1]))
