"""The fused operations on a GPU equal plain PyTorch there: outputs and all gradients of a layer."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from mot_megatron.benchmark.layer_variants import Benchmark, Variant
from mot_megatron.parallel.groups import build_single_process_groups
from tests.model.small_models import assert_all_close

# Sums in another order in fp32; in bf16 plain PyTorch rounds several times, by up to 2^-9 each.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2**-5}


def results(variant: Variant) -> dict[str, torch.Tensor]:
    """Return outputs and gradients, in fp32."""
    outputs = variant.step()
    tensors = {f"output {tower}": part for tower, part in enumerate(outputs)}
    tensors |= {
        f"input {k}": part.grad for k, part in enumerate(variant.inputs) if part.grad is not None
    }
    tensors |= {n: p.grad for n, p in variant.layer.named_parameters() if p.grad is not None}
    variant.clear()
    return {name: tensor.detach().float() for name, tensor in tensors.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "compile"])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_layers_equal_plain_pytorch(
    backend: Literal["triton", "compile"], dtype: torch.dtype
) -> None:
    device = torch.device("cuda")
    setting = Benchmark(1000, 512, 8, device, dtype, build_single_process_groups(device))
    plain = {name: results(setting.ours(k, name)) for k, name in ((1, "dense"), (3, "mot-3"))}
    for variant in setting.fused(backend):
        name = variant.name.partition(" ")[0]
        if name in plain:
            assert_all_close(results(variant), plain[name], TOLERANCES[dtype])
