"""Names of the process groups of a rank, by their role."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch.distributed as dist

from mot_megatron.parallel.groups import ProcessGroups

TENSOR, PIPELINE, MODALITY, DATA, WORLD = "tensor", "pipeline", "modality", "data", "world"
EXPERT, TENSOR_EXPERT, EXPERT_DATA = "expert", "tensor and expert", "expert data"
TOWER = "tower "
"""Followed by the name of a tower."""


def axes_of(groups: ProcessGroups, tower_names: Iterable[str]) -> dict[str, str]:
    """Return the role of every process group of a rank, by the group's name."""
    return {group.group_name: axis for axis, group in groups_by_axis(groups, tower_names)}


def groups_by_axis(
    groups: ProcessGroups, tower_names: Iterable[str]
) -> list[tuple[str, dist.ProcessGroup]]:
    """Return the role of every process group of a rank, and the group.

    A group that has several roles, such as a tower's holders if all data-parallel ranks hold it,
    gets the first: tensor, pipeline, modality, data, tower NAME, expert, tensor and expert, expert
    data (ranks with the same experts), balancing (ranks that count the experts of the same tokens),
    model (tensor and pipeline), embedding (first and last stage), world.
    """
    assert dist.group.WORLD is not None
    # Empty without modality parallelism.
    holders = zip(tower_names, groups.holders, strict=False)
    named = [
        (TENSOR, groups.tensor),
        (PIPELINE, groups.pipeline),
        (MODALITY, groups.modality),
        (DATA, groups.data),
        *((f"{TOWER}{name}", group) for name, group in holders),
        *_expert_axes(groups),
        ("model", groups.model),
        ("embedding", groups.embedding),
        (WORLD, dist.group.WORLD),
    ]
    found: dict[str, tuple[str, dist.ProcessGroup]] = {}
    for axis, group in named:
        if group is not None:
            found.setdefault(group.group_name, (axis, group))
    return list(found.values())


def _expert_axes(groups: ProcessGroups) -> Iterator[tuple[str, dist.ProcessGroup]]:
    for each in groups.experts:
        if each is not None and each.expert.size() > 1:
            yield EXPERT, each.expert
            yield TENSOR_EXPERT, each.tensor_expert
            yield EXPERT_DATA, each.data
    for group in groups.balancing.values():
        yield "balancing", group
