"""What decays and what does not."""

from __future__ import annotations

import torch
from torch import nn

from mot_megatron.optim.parameter_groups import parameter_groups


def parameter(*shape: int, trainable: bool = True) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape), requires_grad=trainable)


def test_matrices_decay_and_vectors_do_not():
    matrix, bias, scalar, cube = parameter(3, 2), parameter(3), parameter(), parameter(2, 2, 2)
    decayed, rest = parameter_groups([matrix, bias, scalar, cube], weight_decay=0.1)
    assert decayed["weight_decay"] == 0.1
    assert [id(p) for p in decayed["params"]] == [id(matrix), id(cube)]
    assert rest["weight_decay"] == 0.0
    assert [id(p) for p in rest["params"]] == [id(bias), id(scalar)]


def test_frozen_parameters_and_empty_groups_are_left_out():
    matrix = parameter(3, 2)
    (group,) = parameter_groups([matrix, parameter(3, trainable=False)], weight_decay=0.1)
    assert [id(p) for p in group["params"]] == [id(matrix)]
