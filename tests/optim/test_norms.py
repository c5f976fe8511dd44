"""Tests of gradient norms by tower and of auxiliary parameters."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mot_megatron.model.sharding import mark_auxiliary, mark_tower
from mot_megatron.optim.norms import StepNorms, step_norms
from mot_megatron.parallel.groups import build_single_process_groups


def of_model_and_causal_router(auxiliary: float) -> StepNorms:
    """Return the norms of gradients 3 and 4 in two towers and one of an auxiliary parameter."""
    build_single_process_groups(torch.device("cpu"))
    modules = [nn.ParameterList([torch.empty(1)]) for _ in range(3)]
    for tower, module in zip((0, 1, 1), modules, strict=True):
        mark_tower(module, tower)
    mark_auxiliary(modules[2])
    values = (3.0, 4.0, auxiliary)
    gradients = [
        (module[0], torch.tensor([value])) for module, value in zip(modules, values, strict=True)
    ]
    return step_norms(gradients, num_towers=2, device=torch.device("cpu"))


def test_auxiliary_parameters_have_a_separate_norm():
    norms = of_model_and_causal_router(12.0)
    assert norms.total == pytest.approx(5.0)  # sqrt(9 + 16)
    assert norms.per_tower == pytest.approx((3.0, 4.0))
    assert norms.auxiliary == pytest.approx(12.0)
    assert norms.finite


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_auxiliary_gradient_makes_the_step_non_finite(value: float):
    norms = of_model_and_causal_router(value)
    assert norms.total == pytest.approx(5.0)
    assert not norms.finite
