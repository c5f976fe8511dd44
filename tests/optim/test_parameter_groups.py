"""Tests of weight decay by parameter, and of the order of owners."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from mot_megatron.optim.owners import Owned, by_owners
from mot_megatron.optim.parameter_groups import parameter_groups


@dataclass(frozen=True)
class Group:
    """A hashable stand-in for a process group."""

    group_name: str


def parameter(*shape: int, tower: int = -1) -> nn.Parameter:
    made = nn.Parameter(torch.zeros(shape))
    made.tower = tower  # type: ignore[attr-defined]
    return made


def ids(parameters: list[nn.Parameter]) -> list[int]:
    return list(map(id, parameters))


def owned(name: str | None, *parameters: nn.Parameter) -> Owned:
    group: Any = SimpleNamespace()
    return Owned(group, name, list(parameters))


def test_matrices_decay_and_vectors_do_not():
    matrix, bias, scalar, cube = parameter(3, 2), parameter(3), parameter(), parameter(2, 2, 2)
    decayed, rest = parameter_groups([owned(None, matrix, bias, scalar, cube)], weight_decay=0.1)
    assert decayed["weight_decay"] == 0.1
    assert ids(decayed["params"]) == ids([matrix, cube])
    assert rest["weight_decay"] == 0.0
    assert ids(rest["params"]) == ids([bias, scalar])
    assert not {"moe", "name"} & (decayed.keys() | rest.keys())


def test_owners_have_separate_groups_and_no_group_is_empty():
    shared, first, second, vector = (
        parameter(3, 2),
        parameter(2, 2),
        parameter(4, 4),
        parameter(5),
    )
    groups = parameter_groups(
        [owned(None, shared), owned("a", first), owned("b", second, vector)], weight_decay=0.1
    )
    assert [ids(group["params"]) for group in groups] == [
        ids([shared]),
        ids([first]),
        ids([second]),
        ids([vector]),
    ]
    assert [group.get("name") for group in groups] == [None, "a", "b", "b"]
    assert [group.get("moe", False) for group in groups] == [False, True, True, True]


def test_learning_rates_have_separate_groups():
    """Shared parameters, and towers whose factor is 1, are one group."""
    tensors = [parameter(2, 2, tower=tower) for tower in (-1, 0, 1, 2, 1)]
    vector = parameter(5, tower=1)
    groups = parameter_groups(
        [owned("a", *tensors, vector)], weight_decay=0.1, lr_mults=(1.0, 0.25, 1.0)
    )
    assert [(ids(group["params"]), group["lr_mult"]) for group in groups] == [
        (ids([tensors[0], tensors[1], tensors[3]]), 1.0),
        (ids([tensors[2], tensors[4]]), 0.25),
        (ids([vector]), 0.25),
    ]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.0]
    assert all(group["name"] == "a" for group in groups)


def test_all_data_parallel_ranks_come_first_then_the_lowest_tower():
    """Towers 0 and 3 are on the same ranks, tower 1 on others, tower 2 on all."""
    data, one, other = map(Group, ("data", "one", "other"))
    by_tower = {-1: data, 0: one, 1: other, 2: data, 3: one}
    groups: Any = SimpleNamespace(
        data=data, reduction_group=lambda tower, _of_experts: by_tower[tower]
    )
    made = {tower: parameter(2, tower=tower) for tower in (3, 1, 2, 0, -1)}
    found = by_owners(made.values(), groups)
    assert [o.group for o in found] == [data, one, other]
    assert [o.name for o in found] == [None, "holders_one", "holders_other"]
    assert [ids(o.parameters) for o in found] == [
        ids([made[2], made[-1]]),
        ids([made[3], made[0]]),
        ids([made[1]]),
    ]
